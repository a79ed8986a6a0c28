"""Packed text of short documents, for tests of attention that does not cross them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

SEPARATOR = 0


def packed_ids(rows: int, length: int, seed: int = 0, vocab_size: int = 96) -> Tensor:
    """Rows that begin in the middle of documents, of which some have one token."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, vocab_size, (rows, length))
    ids[rng.random((rows, length)) < 1 / 6] = SEPARATOR
    ids[:, length // 2 : length // 2 + 2] = SEPARATOR
    return torch.from_numpy(ids)


def documents(row: Tensor) -> Iterator[slice]:
    """Where each document of a row is, found one token after the other."""
    begin = 0
    for place in range(1, len(row)):
        if row[place] == SEPARATOR:
            yield slice(begin, place)
            begin = place
    yield slice(begin, len(row))


def one_by_one(run: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """What `run` makes of ids `[1, tokens]` of every document alone, put together as the rows of `ids` are: `[rows, tokens, ...]`."""
    return torch.stack([torch.cat([run(row[part][None])[0] for part in documents(row)]) for row in ids])
