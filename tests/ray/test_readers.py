"""Models that are asked on Ray give the bits of one process, and nothing that was answered is asked again."""

from contextlib import closing

import numpy as np
import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from small_models import save_parent

from actors.readers import AskOnRay
from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.data.order import Tokens
from puzzle_ray.errors import DataError
from puzzle_ray.evaluation.quality import Quality
from puzzle_ray.evaluation.reader import AskHere
from puzzle_ray.evaluation.requests import ANSWERS, Likelihoods
from puzzle_ray.evaluation.settings import EvaluateConfig
from puzzle_ray.models.child import new_child, read_config, save_child
from puzzle_ray.process import compute_with
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Store


def test_on_ray_the_same_is_found_out(local_ray, tmp_path):
    compute_with(1)
    parent, child = save_parent(tmp_path / "parent", vocab_size=VOCAB_SIZE, max_position_embeddings=1024), tmp_path / "child"
    byte_tokenizer().save_pretrained(parent)
    torch.manual_seed(1)
    save_child(new_child(read_config(parent), (LayerChoice("gqa:1", "ffn:24"),) * 3, torch.float32), parent, child)
    folders = {"parent": str(parent), "child": str(child)}
    text = Tokens(np.random.default_rng(0).integers(2, VOCAB_SIZE, (32, 16), dtype=np.int32))
    how = {"retrieval_tokens": (800,), "retrieval_depths": 1, "retrieval_questions": 1}
    config = EvaluateConfig(tokens=512, samples=2, sample_tokens=4, **how)
    quality = Quality(folders, text, text.counts(VOCAB_SIZE), config, None, 0)
    store = Store(str(tmp_path / "store"))
    here = store.artifact("quality", {"where": "here"}, {})
    expected = quality.run(AskHere(folders, config.batch_tokens, here, Quiet()))
    there = store.artifact("quality", {"where": "there"}, {})
    with closing(AskOnRay(folders, config.batch_tokens, ClusterConfig(), there, Quiet())) as ask:
        assert quality.run(ask) == expected
        assert len(ask.pool.workers) > 1, "several readers"
        with pytest.raises(DataError, match="a continuation has 1025 tokens"):
            ask([("parent", Likelihoods((((1,), tuple([2] * 1025)),)))])
    names = there.names(ANSWERS)
    assert names == here.names(ANSWERS) and len(names) >= 2 * 4
    assert all(there.read(f"{ANSWERS}/{name}") == here.read(f"{ANSWERS}/{name}") for name in names), "bit for bit"
    with closing(AskOnRay(folders, config.batch_tokens, ClusterConfig(), there, Quiet())) as ask:
        assert quality.run(ask) == expected and ask.pool is None, "all of it was there"
