"""Held-out text in three parts that share no sequence: what scores blocks, what picks the child, and what the reported figures are from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from puzzle_ray.data.order import Tokens
from puzzle_ray.errors import DataError


class HeldoutParts(NamedTuple):
    score: Tokens
    pick: Tokens
    test: Tokens

    @property
    def ranges(self) -> dict[str, str]:
        """Which sequences each part has, in words: `0 to 31 of 500`."""
        whole = len(self.score.sequences)
        rows = {name: part.rows for name, part in self._asdict().items()}
        return {name: f"{r[0]} to {r[-1]} of {whole}" for name, r in rows.items()}

    def sources(self, **tokens: int) -> dict[str, str]:
        """What reads so many tokens of a part is identified by: their content, whatever else is held out.

        `sources(score=8192)` is `{"score tokens": <hash>}`.
        """
        return {f"{name} tokens": getattr(self, name).content_hash(count) for name, count in tokens.items()}


def heldout_parts(heldout: Tokens, score_tokens: int, pick_tokens: int, test_tokens: int) -> HeldoutParts:
    """Three parts of consecutive sequences: scoring at the beginning, the pick behind it, the test at the end.

    Each part has what it asks for, and at least one sequence. What nobody asks for stands between the tokens of the pick and those of
    the test, and belongs to `pick`: so asking for more in one place leaves the tokens of the others as they are. Where there is not
    enough, the parts have shares in proportion to what they ask for.

    Documents are packed one after the other, so that consecutive parts share at most the two documents that the boundaries cut.
    Raises DataError for fewer than three sequences.
    """
    length = heldout.sequences.shape[1]
    total = heldout.num_sequences
    asked = [max(1, tokens // length) for tokens in (score_tokens, pick_tokens, test_tokens)]
    score, _, test = part_sizes(total, asked)
    rows = np.arange(total, dtype=np.int64) if heldout.rows is None else heldout.rows

    def part(begin: int, end: int) -> Tokens:
        return replace(heldout, rows=rows[begin:end])

    return HeldoutParts(part(0, score), part(score, total - test), part(total - test, total))


def part_sizes(total: int, asked: Sequence[int]) -> tuple[int, ...]:
    """Sequences of each part; they sum to at most `total`, and each has at least one. Raises DataError where there are too few."""
    if total < len(asked):
        problem = f"{total} held-out sequence{'s' * (total != 1)} cannot be split into {len(asked)} parts (scoring, pick, test)"
        raise DataError("data.heldout", problem, "give more held-out text, or shorten data.sequence_length")
    if sum(asked) <= total:
        return tuple(asked)
    left = total - len(asked)  # each has one; the others are shared out by largest remainders
    wanted = [count - 1 for count in asked]
    shares = [left * count // sum(wanted) for count in wanted]
    by_remainder = sorted(range(len(asked)), key=lambda i: (-(left * wanted[i] % sum(wanted)), i))
    for index in by_remainder[: left - sum(shares)]:
        shares[index] += 1
    return tuple(1 + share for share in shares)
