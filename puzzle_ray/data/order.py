"""Packed sequences, and an order of them that is a pure function of (seed, number)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor


TokenArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Tokens:
    """Packed sequences `[sequences, sequence_length]` of one split."""

    sequences: TokenArray

    @property
    def num_tokens(self) -> int:
        return int(self.sequences.size)

    def batch(self, seed: int, number: int, num_sequences: int) -> Tensor:
        """Micro-batch `number`: `[num_sequences, sequence_length]` int64. Every epoch has a permutation of its own."""
        import torch

        total = len(self.sequences)
        rows = []
        for position in range(number * num_sequences, (number + 1) * num_sequences):
            epoch, offset = divmod(position, total)
            rows.append(_permutation(seed, epoch, total)[offset])
        return torch.from_numpy(self.sequences[rows].astype(np.int64))

    def first(self, max_tokens: int, num_sequences: int) -> list[Tensor]:
        """The first sequences in order, for evaluation: batches of `num_sequences`, at least one, the last may be smaller."""
        import torch

        count = max(1, min(len(self.sequences), max_tokens // self.sequences.shape[1]))
        return [
            torch.from_numpy(self.sequences[i : min(i + num_sequences, count)].astype(np.int64))
            for i in range(0, count, num_sequences)
        ]


_permutations: dict[tuple[int, int, int], npt.NDArray[np.int64]] = {}


def _permutation(seed: int, epoch: int, total: int) -> npt.NDArray[np.int64]:
    key = (seed, epoch, total)
    if key not in _permutations:
        if len(_permutations) > 4:
            _permutations.clear()
        _permutations[key] = np.random.default_rng([seed, epoch, total]).permutation(total)
    return _permutations[key]
