"""Questions in two halves, task by task: one half scores blocks, the other is kept to test children on.

The paper (v5) splits MMLU so and calls it half-MMLU. Each task is split by itself (a stratified split), so that both halves have as many
questions of every task, give or take one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Sequence
from typing import Literal

Half = Literal["score", "test"]
HALVES: tuple[Half, ...] = ("score", "test")


def question_digest(query: str, choices: Sequence[str]) -> bytes:
    """What a question is known by, wherever it is read from."""
    return hashlib.sha256(json.dumps([query, list(choices)]).encode()).digest()


def halves(digests: Sequence[bytes], tasks: Sequence[Hashable]) -> list[Half]:
    """Which half each question is in.

    The questions of a task are ordered by their digests, and the first half of that order scores. Where their number is odd, the last
    bit of the smallest digest says which half has one more. So the split depends on the questions of the task alone, not on their order.
    Questions with the same text are in the same half.
    """
    by_task: dict[Hashable, list[bytes]] = {}
    for digest, task in zip(digests, tasks, strict=True):
        by_task.setdefault(task, []).append(digest)
    last: dict[Hashable, bytes] = {}  # the greatest digest that scores
    for task, own in by_task.items():
        own.sort()
        count = len(own) // 2 + (len(own) % 2 if own[0][-1] % 2 else 0)
        last[task] = own[count - 1] if count else b""
    return ["score" if digest <= last[task] else "test" for digest, task in zip(digests, tasks, strict=True)]
