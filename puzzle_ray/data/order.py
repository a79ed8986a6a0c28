"""Packed sequences, and an order of them that is a pure function of (seed, number)."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from puzzle_ray.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


_COUNTED_SEQUENCES = 4096  # at once, so that no copy of all of them is made

TokenArray = npt.NDArray[np.int32]
RowArray = npt.NDArray[np.int64]
_HASHED_ROWS = 4096


class Sequences(Protocol):
    """Packed sequences that are read by rows: an array in memory, or shards in a store."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: Any, /) -> TokenArray: ...


@dataclass(frozen=True)
class Tokens:
    """Packed sequences `[sequences, sequence_length]` of one split.

    With `rows` it is those rows of `sequences` alone, without a copy. Their order was drawn already: `first` and the first epoch read
    them as they stand.

    `separator` is the token that documents begin with, where each is to be read as if it stood alone (see `puzzle_ray.data.packing`); None
    where attention crosses documents.

    Sequences in memory are permuted as a whole. Sequences in shards are permuted in windows of a few shards: the windows in an order
    that is drawn, and inside each its sequences. So a process reads few shards at a time.
    """

    sequences: Sequences
    rows: RowArray | None = None
    separator: int | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.sequences if self.rows is None else self.rows)

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * self.sequences.shape[1]

    @property
    def window(self) -> int:
        """How many sequences are permuted together."""
        return int(getattr(self.sequences, "window", len(self.sequences)))

    def batch(self, seed: int, number: int, num_sequences: int) -> Tensor:
        """Micro-batch `number`: `[num_sequences, sequence_length]` int64. Every epoch has a permutation of its own."""
        total = self.num_sequences
        chosen = []
        for position in range(number * num_sequences, (number + 1) * num_sequences):
            epoch, offset = divmod(position, total)
            is_drawn = self.rows is not None and epoch == 0
            chosen.append(offset if is_drawn else _permutation(seed, epoch, total, self.window)[offset])
        return self._read(np.asarray(chosen, dtype=np.int64))

    def first(self, max_tokens: int, num_sequences: int) -> list[Tensor]:
        """The first sequences in order, for evaluation: batches of `num_sequences`, at least one, the last may be smaller."""
        count = self._first_count(max_tokens)
        return [self._read(np.arange(i, min(i + num_sequences, count))) for i in range(0, count, num_sequences)]

    def content_hash(self, max_tokens: int | None = None, told: Callable[[], object] = lambda: None) -> str:
        """SHA-256 of the sequences and their shape; with `max_tokens`, of those that `first` reads. Not of where they came from.

        `told` hears of every part that is done.
        """
        count = self.num_sequences if max_tokens is None else self._first_count(max_tokens)
        digest = hashlib.sha256(f"{(count, *self.sequences.shape[1:])}".encode())
        for start in range(0, count, _HASHED_ROWS):
            end = min(start + _HASHED_ROWS, count)
            part = self.sequences[start:end] if self.rows is None else self.sequences[self.rows[start:end]]
            digest.update(np.ascontiguousarray(part, dtype="<i4").data)
            told()
        return digest.hexdigest()

    def counts(self, vocab_size: int) -> npt.NDArray[np.int64]:
        """How often every token is there, `[vocab_size]`."""
        found = np.zeros(vocab_size, dtype=np.int64)
        for start in range(0, self.num_sequences, _COUNTED_SEQUENCES):
            rows = slice(start, start + _COUNTED_SEQUENCES)
            part = self.sequences[rows] if self.rows is None else self.sequences[self.rows[rows]]
            found += np.bincount(part.reshape(-1), minlength=vocab_size)
        return found

    def _first_count(self, max_tokens: int) -> int:
        return max(1, min(self.num_sequences, max_tokens // self.sequences.shape[1]))

    def split_validation(self, seed: int, count: int) -> tuple[Tokens, Tokens]:
        """(validation, training): `count` sequences that training never reads, in whatever epoch, and the others.

        Together they are the first epoch of `seed`: `validation.batch(seed, n, size)` is what `batch(seed, n, size)` is of the whole,
        and `training.batch(seed, n, size)`, in its first epoch, what `batch(seed, n + count // size, size)` is.

        Raises DataError where nothing would be left to train on.
        """
        if self.rows is not None:
            raise ValueError("these tokens are a part already")
        total = len(self.sequences)
        if not 0 < count < total:
            problem = f"{count} sequences for validation leave nothing to train on: there are {total}"
            raise DataError("data.train", problem, "give more text, or lower the tokens for validation")
        order = _permutation(seed, 0, total, self.window)
        return replace(self, rows=order[:count]), replace(self, rows=order[count:])

    def _read(self, chosen: RowArray) -> Tensor:
        import torch

        rows = chosen if self.rows is None else self.rows[chosen]
        return torch.from_numpy(self.sequences[rows].astype(np.int64))


def epochs(tokens_asked: int, tokens_there: int) -> float:
    """How many times training reads its text: above 1 some of it is read again."""
    if tokens_there < 1:
        raise ValueError("there are no tokens")
    return tokens_asked / tokens_there


def told_if_read_again(stage: str, times: float, tokens_there: int) -> None:
    """Says in one line that a stage reads its text more than once, where it does."""
    if times > 1:
        words = f"its text is read {times:.1f} times over: there are {tokens_there} tokens to train on"
        print(f"  {stage}: {words}", file=sys.stderr, flush=True)


_permutations: dict[tuple[int, int, int, int], npt.NDArray[np.int64]] = {}


def _permutation(seed: int, epoch: int, total: int, window: int) -> npt.NDArray[np.int64]:
    """The order of an epoch: a pure function of its arguments. Windows of positions are permuted, and positions inside each."""
    key = (seed, epoch, total, window)
    if key not in _permutations:
        if len(_permutations) > 4:
            _permutations.clear()
        if window >= total:
            _permutations[key] = np.random.default_rng([seed, epoch, total]).permutation(total)
        else:
            draw = np.random.default_rng([seed, epoch, total, window])
            starts = draw.permutation(-(-total // window)) * window
            _permutations[key] = np.concatenate([s + draw.permutation(min(window, total - s)) for s in starts])
    return _permutations[key]
