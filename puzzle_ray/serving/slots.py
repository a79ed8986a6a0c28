"""The engine's key-value cache: one row (slot) per request, one pair of tensors per layer.

Layers may differ in num_key_value_heads and head_dim. A layer without attention may store a `[B, 1, T, 1]` stub or nothing. So every
layer allocates its rows from the first states that it gets. The requests being decoded are always in rows 0..n-1. So a decode step reads
a view of the cache and copies nothing. The last row moves into a row that becomes free.

Legend: B rows in this forward pass, T tokens, S slots, L the slot's length in tokens, K key-value heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from puzzle_ray.errors import ConfigError


@dataclass
class ForwardPass:
    """What the forward pass in progress does with the slots. All layers share one object.

    During prefill, `positions` is None, and rows from `first_row` on are written from position 0.
    During decode, `positions` [B] holds the new token's position in each of `rows` [B], which are rows 0..B-1. `kv_length` is the length
    of the longest row, with the new token.
    """

    first_row: int = 0
    positions: Tensor | None = None
    rows: Tensor | None = None
    kv_length: int = 0


class SlotLayer(CacheLayerMixin):
    """One layer's slots: `keys` and `values` of `[S, K, L, D]`."""

    def __init__(self, num_slots: int, max_length: int, forward_pass: ForwardPass) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.max_length = max_length
        self.forward_pass = forward_pass

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros instead of uninitialised memory: a decode step also reads masked positions that were never written, and 0 * NaN is NaN.
        def rows_like(states: Tensor) -> Tensor:
            shape = (self.num_slots, states.shape[1], self.max_length, states.shape[3])
            return torch.zeros(shape, dtype=states.dtype, device=states.device)

        try:
            self.keys, self.values = rows_like(key_states), rows_like(value_states)
        except RuntimeError as error:
            raise ConfigError(
                "max_length",
                f"no memory for a key-value cache of {self.num_slots} requests x {self.max_length} tokens",
                "lower max_length or max_batch_size",
            ) from error
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the new states (`[B, K, T, D]`). Returns the states to attend to: `[B, K, T or kv_length, D]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        now, (batch, _, length, _) = self.forward_pass, key_states.shape
        if now.positions is None:
            rows = slice(now.first_row, now.first_row + batch)
            self.keys[rows, :, :length] = key_states
            self.values[rows, :, :length] = value_states
            return key_states, value_states
        self.keys[now.rows, :, now.positions] = key_states[:, :, 0]
        self.values[now.rows, :, now.positions] = value_states[:, :, 0]
        return self.keys[:batch, :, : now.kv_length], self.values[:batch, :, : now.kv_length]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of row `source` over row `target`."""
        if self.keys is not None and self.values is not None:
            self.keys[target, :, :length] = self.keys[source, :, :length]
            self.values[target, :, :length] = self.values[source, :, :length]

    def get_seq_length(self) -> int:
        return 0 if self.forward_pass.positions is None else self.forward_pass.kv_length - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.max_length


class SlotCache(Cache):
    """A transformers cache whose rows are requests at different positions."""

    def __init__(self, num_layers: int, num_slots: int, max_length: int) -> None:
        self.forward_pass = ForwardPass()
        self.num_slots = num_slots
        self.max_length = max_length
        self.slot_layers = [SlotLayer(num_slots, max_length, self.forward_pass) for _ in range(num_layers)]
        super().__init__(layers=list(self.slot_layers))

    def begin_prefill(self, first_row: int) -> None:
        """The next forward pass fills rows from `first_row` on, from position 0. Decode overwrites the padding on the right."""
        self.forward_pass.first_row, self.forward_pass.positions = first_row, None

    def begin_decode(self, positions: Tensor, kv_length: int) -> None:
        """The next forward pass adds one token to each of rows 0..B-1, at `positions` (`[B]`)."""
        self.forward_pass.positions, self.forward_pass.kv_length = positions, kv_length
        self.forward_pass.rows = torch.arange(positions.shape[0], device=positions.device)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy row `source` (its first `length` positions) over row `target` in every layer."""
        for layer in self.slot_layers:
            layer.move(source, target, length)

    @property
    def memory_mib(self) -> float:
        """The memory of all layers' rows that are allocated so far, in MiB."""
        held = [tensor for layer in self.slot_layers for tensor in (layer.keys, layer.values) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in held) / 2**20


class DecodeMasks:
    """Additive attention masks for one new token per row, in the form that the model's `forward` uses unchanged.

    transformers uses a 4-D mask as it is. Models that mix full and sliding-window layers take a dict by layer type.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        self.dtype = dtype
        window: int | None = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ())
        # GPT-Neo has `attention_layers`. Its local layers compute the window themselves, from the longest row.
        unknown = kinds.union(getattr(config, "attention_layers", ())) - {"full_attention", "sliding_attention", "global"}
        if unknown:
            raise ConfigError(
                "model",
                f"has layers of type {', '.join(sorted(unknown))}",
                "the engine serves full and sliding-window attention",
            )
        self.mixed = "sliding_attention" in kinds
        windows = {"full_attention": None, "sliding_attention": window}
        self.windows = windows if self.mixed else {"all": None if kinds else window}

    def __call__(self, positions: Tensor, kv_length: int) -> Tensor | dict[str, Tensor]:
        """The masks `[B, 1, 1, kv_length]` for new tokens at `positions` `[B]`: 0 where a row looks, else the dtype's minimum."""
        seen = torch.arange(kv_length, device=positions.device)
        masks = {}
        for kind, window in self.windows.items():
            hidden = seen > positions[:, None]
            if window is not None:
                hidden |= seen <= positions[:, None] - window
            zeros = torch.zeros(hidden.shape, dtype=self.dtype, device=positions.device)
            masks[kind] = zeros.masked_fill_(hidden, torch.finfo(self.dtype).min)[:, None, None]
        return masks if self.mixed else masks["all"]
