"""Local distillation on parents that know something: a gated Llama and a GPT-2, trained here on a small language."""

import math

import numpy as np
import pytest
import torch
from layer_trainers import CONFIG
from small_models import tiny_config
from torch.nn import functional as F

from puzzle_ray.data.order import Tokens
from puzzle_ray.distill.library import build_serially
from puzzle_ray.models.child import read_config
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

VOCAB, LENGTH = 32, 32
STEP_OF = np.random.default_rng(7).permutation(VOCAB)


def language(count: int, seed: int) -> np.ndarray:
    """A token follows from the one three before it, nine times in ten: attention has to look back, the FFN to know the step."""
    rng = np.random.default_rng(seed)
    text = rng.integers(0, VOCAB, (count, LENGTH))
    known = rng.random((count, LENGTH)) < 0.9
    for t in range(3, LENGTH):
        text[:, t] = np.where(known[:, t], STEP_OF[text[:, t - 3]], text[:, t])
    return text.astype(np.int32)


def trained_parent(folder, model_type):
    """Trained for some seconds, until it predicts far better than the tokens' frequencies do."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config(model_type, vocab_size=VOCAB, max_position_embeddings=LENGTH, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    text, losses = torch.from_numpy(language(250 * 16, 1)).long(), []
    for ids in text.split(16):
        loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-20:]) < 0.6 * math.log(VOCAB), "the parent has learnt the language"
    model.eval().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_every_trained_variant_ends_below_its_training_free_start(tmp_path, model_type):
    folder = trained_parent(tmp_path / "parent", model_type)
    space = search_space(read_config(folder), ("gqa:1", "linear", "noop"), ("ffn:50%", "ffn:25%", "linear", "noop"), 4)
    config = CONFIG.model_copy(
        update={"tokens": 16_384, "micro_batch_tokens": 256, "calibration_tokens": 2_048, "validation_tokens": 1_024}
    )
    step = Store(str(tmp_path)).artifact("library", {}, {})
    rows = build_serially(str(folder), space, config, Tokens(language(1200, 2)), 0, step, Quiet()).rows()
    trained = [row for row in rows if row.tokens]
    assert len(trained) == 2 * 5 and {row.variant for row in rows} - {row.variant for row in trained} == {"noop"}
    for row in trained:
        assert row.final_loss < row.start_loss and row.kept == "trained" and not row.failure, row
    assert np.median([row.final_loss / row.start_loss for row in trained]) < 0.9
