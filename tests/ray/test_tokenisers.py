"""Text that is tokenised on Ray: the shards of one process, bit for bit, whoever dies on the way."""

import json
from contextlib import closing

import numpy as np
import pytest
import ray
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from small_models import save_parent
from small_runs import make_run, save_parent_with_text

from actors import tokenisers
from actors.tokenisers import OnRay, ParentTokenizer, num_tokenisers
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.data import blocks
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.data.splits import save_tokens, write_tokens
from puzzle_ray.errors import DataError
from puzzle_ray.store import Store

LENGTH = 16


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = save_parent(tmp_path_factory.mktemp("parent"), vocab_size=VOCAB_SIZE)
    byte_tokenizer().save_pretrained(folder)
    return ParentTokenizer(str(folder))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for name, count in (("a", 900), ("b", 400)):
        rows = [{"text": f"{i} " + "".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(5, 90)))} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def cases(texts):
    both = [{"source": str(texts / "a.jsonl"), "weight": 2}, {"source": str(texts / "b.jsonl")}]
    common = {"sequence_length": LENGTH}
    return {
        "a mixture, held out by hash": DataConfig(train=both, heldout_fraction=0.2, **common),
        "limits": DataConfig(train=both, heldout_fraction=0.2, max_train_tokens=12_000, max_heldout_tokens=1500, **common),
        "few documents": DataConfig(train=str(texts / "b.jsonl"), max_train_tokens=9000, **common),
        "a held-out file": DataConfig(train=str(texts / "a.jsonl"), heldout=str(texts / "b.jsonl"), **common),
    }


def written(artifact):
    """Every file but the record."""
    names = [f"{folder}/{name}" for folder in ("train", "heldout", "all") for name in artifact.names(folder)]
    return {name: artifact.read(name) for name in [*names, "tokens.json"]}


@pytest.fixture
def deaths(monkeypatch):
    """Kills the first worker once a block is done, and the reader once two are; a list of who died."""
    died, receive = [], tokenisers._Flow.receive

    def receiving(flow, lane, result):
        goes_on = receive(flow, lane, result)
        if flow.done.num_blocks >= 1 and not died:
            ray.kill(workers[-1].pool.ready[0].handle)
            died.append("worker")
        if flow.done.num_blocks >= 2 and len(died) == 1:
            ray.kill(flow.reader, no_restart=False)
            died.append("reader")
        return goes_on

    workers = []
    init = tokenisers.OnRay.__init__
    monkeypatch.setattr(tokenisers.OnRay, "__init__", lambda self, *a: (workers.append(self), init(self, *a))[1])
    monkeypatch.setattr(tokenisers._Flow, "receive", receiving)
    return died


def test_on_ray_the_same_shards_are_written_whoever_dies(local_ray, parent, texts, tmp_path, monkeypatch, deaths):
    monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", 2500)
    store = Store(str(tmp_path))
    there = store.artifact("tokens", {"where": "there"}, {})
    with closing(OnRay(parent, there, VOCAB_SIZE, ClusterConfig(), 2)) as on_ray:
        for case, config in cases(texts).items():
            here = store.artifact("tokens", {"where": "here", "case": case}, {})
            save_tokens(config, byte_tokenizer(), None, here, VOCAB_SIZE)
            there = store.artifact("tokens", {"where": "there", "case": case}, {})
            on_ray.artifact = there
            write_tokens(config, None, there, on_ray, on_ray.train_hash)
            expected = written(here)
            assert len(expected) > 5 and written(there) == expected, case
            assert there.facts() == here.facts(), case
    assert deaths == ["worker", "reader"]


def test_the_stage_asks_for_as_many_workers_as_it_is_told_to(local_ray, texts, tmp_path, monkeypatch):
    used, init = [], tokenisers.OnRay.__init__
    monkeypatch.setattr(tokenisers.OnRay, "__init__", lambda self, *a: (used.append(a[4]), init(self, *a))[1])
    parent_with_text = save_parent_with_text(tmp_path / "parent")
    mixture = f"data.train=[{{source: {texts / 'a.jsonl'}, weight: 2}}, {texts / 'b.jsonl'}]"
    here, there = (
        make_run(parent_with_text, tmp_path / f"store {n}", mixture, f"data.tokenise_workers={n}").done("tokens") for n in (0, 1)
    )
    assert used == [1] and here.key == there.key
    assert written(here) == written(there) and here.facts() == there.facts()


def test_who_tokenises(local_ray, texts):
    def number(**settings):
        return num_tokenisers(DataConfig(train=str(texts / "a.jsonl"), **settings), ClusterConfig())

    assert number() == 0 and number(tokenise_workers=0) == 0, "little text stays here"
    assert number(tokenise_workers=1) == 1 and number(tokenise_workers=3) == 3
    assert number(tokenise_workers=99) == 4, "as many as there are CPUs"


def test_what_is_wrong_with_the_text_is_said_as_here(local_ray, parent, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "a" * 900}) + "\n" + json.dumps({"text": 7}) + "\n")
    config = DataConfig(train=str(tmp_path / "bad.jsonl"), heldout=str(tmp_path / "bad.jsonl"), sequence_length=LENGTH)
    artifact = Store(str(tmp_path)).artifact("tokens", {}, {})
    words = "bad.jsonl', line 2: column 'text' holds integer, not text"
    with closing(OnRay(parent, artifact, VOCAB_SIZE, ClusterConfig(), 1)) as on_ray, pytest.raises(DataError, match=words):
        write_tokens(config, None, artifact, on_ray, on_ray.train_hash)
    assert not artifact.finished
