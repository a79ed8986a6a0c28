"""Which sequences are for what: held-out text in three parts, and validation that training never reads."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puzzle_ray.config import load
from puzzle_ray.data.order import Tokens, epochs
from puzzle_ray.data.parts import heldout_parts, part_sizes
from puzzle_ray.errors import DataError

LENGTH = 4


def tokens_of(count):
    """Sequence `n` begins with token `LENGTH * n`."""
    return Tokens(np.arange(count * LENGTH, dtype=np.int32).reshape(count, LENGTH))


def numbers(tokens):
    return [int(batch[0, 0]) // LENGTH for batch in tokens.first(10**9, 1)]


asks = st.integers(0, 400)


@given(st.integers(3, 60), asks, asks, asks)
def test_three_parts_are_disjoint_complete_and_the_same_every_time(total, score, pick, test):
    heldout = tokens_of(total)
    parts = heldout_parts(heldout, score, pick, test)
    assert sorted(number for part in parts for number in numbers(part)) == list(range(total))
    assert all(part.num_sequences >= 1 for part in parts)
    assert [numbers(part) for part in heldout_parts(heldout, score, pick, test)] == [numbers(part) for part in parts]


@given(st.integers(3, 60), asks, asks, asks)
def test_each_part_has_what_it_asks_for_or_its_share(total, score, pick, test):
    asked = [max(1, tokens // LENGTH) for tokens in (score, pick, test)]
    sizes = [part.num_sequences for part in heldout_parts(tokens_of(total), score, pick, test)]
    if sum(asked) <= total:
        assert all(size >= wanted for size, wanted in zip(sizes, asked, strict=True))
    else:
        assert all(size <= wanted for size, wanted in zip(sizes, asked, strict=True))
        shares = [1 + (total - 3) * (wanted - 1) / (sum(asked) - 3) for wanted in asked]
        assert all(abs(size - share) < 1 for size, share in zip(sizes, shares, strict=True))


def test_asking_for_more_in_one_place_leaves_the_others_as_they_are():
    heldout = tokens_of(40)
    before, after = heldout_parts(heldout, 20, 20, 40), heldout_parts(heldout, 20, 60, 40)
    assert numbers(before.score) == numbers(after.score) == [0, 1, 2, 3, 4]
    assert numbers(before.test) == numbers(after.test) == list(range(30, 40))
    assert numbers(after.pick)[:5] == numbers(before.pick)[:5] == [5, 6, 7, 8, 9]


def test_the_part_of_the_pick_is_large_enough_for_what_training_is_watched_on():
    """But takes no more from scarce text than the test does."""
    asked = {"gkd.heldout_tokens": 4096, "search.candidates": 1, "search.sweep_measure": False, "evaluate.tokens": 8192}

    def pick_tokens(**more):
        return load(overrides=tuple(f"{name}={json.dumps(value)}" for name, value in (asked | more).items())).pick_tokens

    assert pick_tokens() == 4096
    assert pick_tokens(**{"gkd.heldout_tokens": 10_000}) == 8192
    assert pick_tokens(**{"gkd.tokens": 0}) == pick_tokens(**{"gkd.heldout_tokens": 0}) == 0
    assert pick_tokens(**{"search.candidates": 3, "search.measure_tokens": 50_000}) == 50_000


def test_too_few_sequences_for_three_parts():
    with pytest.raises(DataError, match="2 held-out sequences cannot be split into 3 parts"):
        heldout_parts(tokens_of(2), 8, 8, 8)
    assert part_sizes(3, [100, 1, 5]) == (1, 1, 1)


@given(st.integers(2, 40), st.data(), st.integers(0, 5))
def test_validation_is_never_trained_on_however_many_epochs(total, data, seed):
    count = data.draw(st.integers(1, total - 1))
    validation, training = tokens_of(total).split_validation(seed, count)
    assert validation.num_sequences == count and validation.num_tokens + training.num_tokens == total * LENGTH
    held = {int(row[0]) for row in validation.batch(seed, 0, count)}
    for epoch in range(4):
        seen = [int(row[0]) for row in training.batch(seed, epoch, total - count)]
        assert len(set(seen)) == len(seen) and not held & set(seen) and len(held) + len(seen) == total


def test_the_first_epoch_is_that_of_the_whole():
    whole = tokens_of(23)
    validation, training = whole.split_validation(3, 6)
    assert all(torch.equal(validation.batch(3, n, 2), whole.batch(3, n, 2)) for n in range(3))
    assert all(torch.equal(training.batch(3, n, 2), whole.batch(3, n + 3, 2)) for n in range(8))
    second = [int(row[0]) for row in training.batch(3, 1, 17)]
    assert second != [int(row[0]) for row in training.batch(3, 0, 17)]


@pytest.mark.parametrize("count", [0, 10, 11])
def test_validation_that_leaves_nothing_is_refused(count):
    with pytest.raises(DataError, match="leave nothing to train on: there are 10"):
        tokens_of(10).split_validation(0, count)


def test_epochs():
    assert epochs(100, 200) == 0.5 and epochs(1000, 400) == 2.5
