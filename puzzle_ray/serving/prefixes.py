"""What earlier requests left in the key-value cache, for later ones whose text begins with the same tokens.

The states of a request are kept in blocks of 64 tokens. A block's name is a hash of all tokens up to its end. So two requests share as
many blocks as their common beginning has, and a system prompt is kept once. The blocks that were not used for longest make room.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from puzzle_ray.serving.slots import SlotCache

BLOCK_TOKENS = 64

Block = tuple[tuple[Tensor, ...], ...]  # layer -> what it holds of these tokens


class PrefixCache:
    """Blocks of states by the tokens that lead to them. `capacity_tokens`: how many tokens it may hold; 0 keeps nothing."""

    def __init__(self, slots: SlotCache, capacity_tokens: int) -> None:
        sliceable = all(layer.sliceable for layer in slots.slot_layers)
        self._slots = slots
        self._capacity = capacity_tokens // BLOCK_TOKENS if sliceable else 0
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()  # the latest used is the last

    @property
    def tokens(self) -> int:
        """How many tokens it holds."""
        return len(self._blocks) * BLOCK_TOKENS

    def known(self, token_ids: Sequence[int]) -> int:
        """How many of the first tokens could be restored. Never all of them: the last one's logits are needed."""
        return len(self._found(token_ids)) * BLOCK_TOKENS

    def restore(self, token_ids: Sequence[int], row: int) -> int:
        """Writes the states of the known beginning of `token_ids` into row `row`. Returns their number."""
        names = self._found(token_ids)
        for index, name in enumerate(names):
            for layer, states in zip(self._slots.slot_layers, self._blocks[name], strict=True):
                layer.write(row, index * BLOCK_TOKENS, states)
        for name in reversed(names):  # the first blocks are the last to go: without them the others are of no use
            self._blocks.move_to_end(name)
        return len(names) * BLOCK_TOKENS

    def keep(self, token_ids: Sequence[int], row: int) -> None:
        """Copies the states of `token_ids` out of row `row`, whole blocks only, as far as they are not here already."""
        names = list(_names(token_ids, len(token_ids) // BLOCK_TOKENS))[: self._capacity]
        for index, name in enumerate(names):
            if name not in self._blocks:
                start = index * BLOCK_TOKENS
                self._blocks[name] = tuple(layer.read(row, start, start + BLOCK_TOKENS) for layer in self._slots.slot_layers)
        for name in reversed(names):
            self._blocks.move_to_end(name)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)

    def _found(self, token_ids: Sequence[int]) -> list[bytes]:
        found: list[bytes] = []
        if self._blocks:
            for name in _names(token_ids, (len(token_ids) - 1) // BLOCK_TOKENS):
                if name not in self._blocks:
                    break
                found.append(name)
        return found


def _names(token_ids: Sequence[int], number: int) -> Iterator[bytes]:
    """The names of the first `number` blocks."""
    name = b""
    for index in range(number):
        tokens = np.array(token_ids[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS], dtype=np.int64)
        name = hashlib.sha256(name + tokens.tobytes()).digest()
        yield name
