"""The engine's key-value cache: one row per request, one pair of tensors per layer. Rows grow in number and length as requests need them.

Layers may differ in num_key_value_heads and head_dim. A layer without attention may store a `[B, 1, T, 1]` stub or nothing. So every
layer allocates its rows from the first states that it gets. The requests being decoded are always in rows 0..n-1. So a decode step reads
a view of the cache and copies nothing.

All rows have the same length, that of the longest request's (rounded up). The engine sees to it that rows x length stays in its budget.

A kind of layer that keeps a state of fixed size (convolution, recurrence) has a place here: a `SlotLayer` of its own with `resize`,
`move`, `clear`, and `read` and `write` for the state after a whole number of tokens. `bytes_per_token` is then 0, `sliceable` False.

Legend: B rows in this forward pass, T tokens, R rows, L a row's length in tokens, K key-value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from puzzle_ray.errors import ConfigError


@dataclass
class ForwardPass:
    """What the forward pass in progress does with the rows. All layers share one object.

    Its B requests are in rows `first_row`.. in order. Where `positions` is None, all of them begin at position 0, and look at nothing
    but themselves. Otherwise `positions` `[B, T]` holds the positions of the new tokens. `kv_length` is the number of positions to look at.
    """

    first_row: int = 0
    positions: Tensor | None = None
    rows: Tensor | None = None  # [B, 1]
    kv_length: int = 0


class SlotLayer(CacheLayerMixin):
    """One layer's rows: `keys` and `values` of `[R, K, L, D]`."""

    sliceable = True  # a beginning of a row is what a shorter request's row would hold

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = self._zeros(key_states, self._cache.num_rows, self._cache.row_length)
        self.values = self._zeros(value_states, self._cache.num_rows, self._cache.row_length)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the new states (`[B, K, T, D]`). Returns the states to attend to: `[B, K, T or kv_length, D]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        now, (batch, _, length, _) = self._cache.forward_pass, key_states.shape
        rows = slice(now.first_row, now.first_row + batch)
        if now.positions is None:
            self.keys[rows, :, :length] = key_states
            self.values[rows, :, :length] = value_states
            return key_states, value_states
        self.keys[now.rows, :, now.positions] = key_states.transpose(1, 2)
        self.values[now.rows, :, now.positions] = value_states.transpose(1, 2)
        return self.keys[rows, :, : now.kv_length], self.values[rows, :, : now.kv_length]

    def tensors(self) -> tuple[Tensor, ...]:
        """What the layer holds, if anything."""
        return () if self.keys is None or self.values is None else (self.keys, self.values)

    def bytes_per_token(self) -> int:
        return sum(each.shape[1] * each.shape[3] * each.element_size() for each in self.tensors())

    def resize(self, num_rows: int, length: int) -> None:
        """Other numbers of rows and positions. What has its place in both is kept."""
        if self.keys is None or self.values is None or (self.keys.shape[0], self.keys.shape[2]) == (num_rows, length):
            return

        def resized(old: Tensor) -> Tensor:
            new, rows, kept = self._zeros(old, num_rows, length), min(num_rows, old.shape[0]), min(length, old.shape[2])
            new[:rows, :, :kept] = old[:rows, :, :kept]
            return new

        self.keys, self.values = resized(self.keys), resized(self.values)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of row `source` over row `target`."""
        for held in self.tensors():
            held[target, :, :length] = held[source, :, :length]

    def clear(self, row: int) -> None:
        for held in self.tensors():
            held[row] = 0

    def read(self, row: int, start: int, end: int) -> tuple[Tensor, ...]:
        """A copy of what row `row` holds of positions `start` to `end`."""
        return tuple(held[row, :, start:end].clone() for held in self.tensors())

    def write(self, row: int, start: int, states: Sequence[Tensor]) -> None:
        """Put back what `read` gave, at position `start`."""
        for held, state in zip(self.tensors(), states, strict=True):
            held[row, :, start : start + state.shape[1]] = state

    def get_seq_length(self) -> int:
        now = self._cache.forward_pass
        return 0 if now.positions is None else now.kv_length - now.positions.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self._cache.row_length

    def _zeros(self, states: Tensor, num_rows: int, length: int) -> Tensor:
        # Zeros instead of uninitialised memory: a pass also reads masked positions that were never written, and 0 * NaN is NaN.
        try:
            return torch.zeros((num_rows, states.shape[1], length, states.shape[3]), dtype=states.dtype, device=states.device)
        except RuntimeError as error:
            problem = f"no memory for a key-value cache of {num_rows} requests x {length} tokens"
            raise ConfigError("kv_cache_mib", problem, "lower it, or max_length or max_batch_size") from error


class SlotCache(Cache):
    """A transformers cache whose rows are requests at different positions."""

    def __init__(self, num_layers: int, num_rows: int, row_length: int) -> None:
        self.forward_pass = ForwardPass()
        self.num_rows = num_rows
        self.row_length = row_length
        self.slot_layers = [SlotLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self.slot_layers))

    def begin_fresh(self, first_row: int) -> None:
        """The next forward pass fills rows from `first_row` on, from position 0. Later tokens overwrite the padding on the right."""
        self.forward_pass.first_row, self.forward_pass.positions = first_row, None

    def begin(self, first_row: int, positions: Tensor, kv_length: int) -> None:
        """The next forward pass adds tokens at `positions` `[B, T]` to rows from `first_row` on, and looks at `kv_length` positions."""
        rows = torch.arange(first_row, first_row + positions.shape[0], device=positions.device)[:, None]
        self.forward_pass.first_row, self.forward_pass.positions = first_row, positions
        self.forward_pass.rows, self.forward_pass.kv_length = rows, kv_length

    def resize(self, num_rows: int, row_length: int) -> None:
        """Other numbers of rows and positions, layer by layer: never more than one layer is there twice. Raises ConfigError."""
        if (num_rows, row_length) == (self.num_rows, self.row_length):
            return
        before = self.num_rows, self.row_length
        try:
            self._resize(num_rows, row_length)
        except ConfigError:  # some layers have their new size already
            self._resize(*before)
            raise

    def _resize(self, num_rows: int, row_length: int) -> None:
        self.num_rows, self.row_length = num_rows, row_length
        for layer in self.slot_layers:
            layer.resize(num_rows, row_length)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy row `source` (its first `length` positions) over row `target` in every layer."""
        for layer in self.slot_layers:
            layer.move(source, target, length)

    def clear(self, row: int) -> None:
        """Zeros in row `row`. A request that failed may have left numbers there that are none, and 0 * NaN is NaN."""
        for layer in self.slot_layers:
            layer.clear(row)

    @property
    def bytes_per_token(self) -> int:
        """What one position of one row takes in all layers. Known after a first forward pass."""
        return sum(layer.bytes_per_token() for layer in self.slot_layers)

    @property
    def memory_mib(self) -> float:
        """The memory of all rows that are allocated now, in MiB."""
        return self.num_rows * self.row_length * self.bytes_per_token / 2**20
