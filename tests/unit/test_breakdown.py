"""Tables of where predictions differ: every token is in one bucket of each, and the buckets are what they say."""

import numpy as np
import pytest

from puzzle_ray.data.order import Tokens
from puzzle_ray.evaluation.breakdown import UNSEEN, by_document_length, by_frequency, by_position, windows

S, T, V = 6, 64, 10
RNG = np.random.default_rng(0)
IDS = RNG.integers(1, V, (S, T))
PARENT = {"loss": RNG.random((S, T - 1), dtype=np.float32), "best": RNG.integers(0, V, (S, T - 1), dtype=np.int32)}
CHILD = {"loss": PARENT["loss"] + 0.5, "best": np.where(np.arange(T - 1) < 31, PARENT["best"], -1)}
ANSWERS = {"parent": PARENT, "child": CHILD}


def whole(table):
    return sum(row["tokens"] for row in table)


def test_positions():
    table = by_position(ANSWERS, IDS)
    assert [row["bucket"] for row in table] == ["1 to 15", "16 to 31", "32 to 63"]
    assert [row["tokens"] for row in table] == [15 * S, 16 * S, 32 * S]
    assert [row["models"]["child"]["agreement"] for row in table] == [1.0, 1.0, 0.0], "the first 31 predictions agree"
    first = table[0]["models"]
    assert first["parent"]["loss"] == pytest.approx(PARENT["loss"][:, :15].mean(), abs=1e-6)
    assert first["child"]["perplexity"] == pytest.approx(first["parent"]["perplexity"] * np.exp(0.5), rel=1e-5)


def test_documents_go_on_over_sequences():
    ids = IDS.copy()
    ids[0, 10] = ids[1, 20] = 0  # 10 tokens, a document of 74 tokens, and the rest
    table = by_document_length(ANSWERS, ids, 0)
    assert {row["bucket"]: row["tokens"] for row in table} == {"1 to 64": 9, "65 to 128": 73, f"257 to {512}": S * T - S - 82}
    assert by_document_length(ANSWERS, IDS, 0) == by_document_length(ANSWERS, IDS, None) == []


def test_frequencies_are_those_of_the_training_text():
    counts = Tokens(np.repeat(np.arange(9, dtype=np.int32), [0, 10_000, 500, 50, 5, 1, 10_000, 10_000, 10_000])[None]).counts(V)
    assert counts.tolist() == [0, 10_000, 500, 50, 5, 1, 10_000, 10_000, 10_000, 0]
    table = {row["bucket"]: row["tokens"] for row in by_frequency(ANSWERS, IDS, counts)}
    next_ids = IDS[:, 1:]
    assert table["below 0.01 %"] == (next_ids == 5).sum() and table[UNSEEN] == (next_ids == 9).sum()
    assert table["0.01 to 0.1 %"] == (next_ids == 4).sum() and table["0.1 to 1 %"] == (next_ids == 3).sum()
    assert sum(table.values()) == whole(by_position(ANSWERS, IDS)) == S * (T - 1)
    rows = Tokens(np.arange(12, dtype=np.int32).reshape(4, 3), rows=np.array([3, 0]))
    assert rows.counts(12).nonzero()[0].tolist() == [0, 1, 2, 9, 10, 11]


def test_windows_are_the_same_text_in_longer_pieces():
    joined = windows(IDS, 128)
    assert joined.shape == (3, 128) and (joined.reshape(-1) == IDS.reshape(-1)).all()
    assert windows(IDS, T) is not None and windows(IDS, 10_000).shape == (1, S * T), "at least one"
