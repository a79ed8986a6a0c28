"""The engine's key-value cache: one row (slot) per request, one pair of tensors per layer.

Layers may differ in num_key_value_heads and head_dim, and a layer without attention may store a `[B, 1, T, 1]` stub or
nothing: every layer allocates its own rows from the first states it is handed. The requests being decoded always occupy
rows 0..n-1, so that a decode step reads a view of the cache and copies nothing; a freed row is filled from the last.

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
class Step:
    """What the forward pass in progress does with the slots; all layers read the same one.

    `positions` is None during prefill, which writes rows `first_row`.. from position 0. During decode it holds the new
    token's position in each of `rows` (both `[B]`, rows 0..B-1); `kv_length` is the longest row's, new token included.
    """

    first_row: int = 0
    positions: Tensor | None = None
    rows: Tensor | None = None
    kv_length: int = 0


class SlotLayer(CacheLayerMixin):
    """One layer's slots: `keys` and `values` of `[S, K, L, D]`."""

    def __init__(self, num_slots: int, max_length: int, step: Step) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.max_length = max_length
        self.step = step

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not empty: a decode step reads (and masks) positions that a short row never wrote, and 0 * NaN is NaN.
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
        """Store the new states (`[B, K, T, D]`) and return those to attend to: `[B, K, T or kv_length, D]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        step, (batch, _, length, _) = self.step, key_states.shape
        if step.positions is None:
            rows = slice(step.first_row, step.first_row + batch)
            self.keys[rows, :, :length] = key_states
            self.values[rows, :, :length] = value_states
            return key_states, value_states
        self.keys[step.rows, :, step.positions] = key_states[:, :, 0]
        self.values[step.rows, :, step.positions] = value_states[:, :, 0]
        return self.keys[:batch, :, : step.kv_length], self.values[:batch, :, : step.kv_length]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of row `source` over row `target`."""
        if self.keys is not None and self.values is not None:
            self.keys[target, :, :length] = self.keys[source, :, :length]
            self.values[target, :, :length] = self.values[source, :, :length]

    def get_seq_length(self) -> int:
        return 0 if self.step.positions is None else self.step.kv_length - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.max_length


class SlotCache(Cache):
    """A cache of transformers whose rows are requests at different positions."""

    def __init__(self, num_layers: int, num_slots: int, max_length: int) -> None:
        self.step = Step()
        self.num_slots = num_slots
        self.max_length = max_length
        self.slot_layers = [SlotLayer(num_slots, max_length, self.step) for _ in range(num_layers)]
        super().__init__(layers=list(self.slot_layers))

    def begin_prefill(self, first_row: int) -> None:
        """The next forward pass fills rows `first_row`.. from position 0; right padding is overwritten by decode."""
        self.step.first_row, self.step.positions = first_row, None

    def begin_decode(self, positions: Tensor, kv_length: int) -> None:
        """The next forward pass adds one token to each of rows 0..B-1, at `positions` (`[B]`)."""
        self.step.positions, self.step.kv_length = positions, kv_length
        self.step.rows = torch.arange(positions.shape[0], device=positions.device)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy row `source` (its first `length` positions) over row `target` in every layer."""
        for layer in self.slot_layers:
            layer.move(source, target, length)

    @property
    def memory_mib(self) -> float:
        """Memory of all rows of all layers seen so far, MiB."""
        held = [tensor for layer in self.slot_layers for tensor in (layer.keys, layer.values) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in held) / 2**20


class DecodeMasks:
    """Additive attention masks for one new token per row, in the form the model's `forward` passes on as is.

    transformers returns a 4-D mask untouched; models that mix full and sliding-window layers take a dict by layer type.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        self.dtype = dtype
        window: int | None = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ())
        # GPT-Neo's `attention_layers`: its local layers compute the window themselves, from the longest row.
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
        """New tokens' `positions` `[B]` -> `[B, 1, 1, kv_length]`: 0 where a row looks, else the dtype's minimum."""
        seen = torch.arange(kv_length, device=positions.device)
        masks = {}
        for kind, window in self.windows.items():
            hidden = seen > positions[:, None]
            if window is not None:
                hidden |= seen <= positions[:, None] - window
            zeros = torch.zeros(hidden.shape, dtype=self.dtype, device=positions.device)
            masks[kind] = zeros.masked_fill_(hidden, torch.finfo(self.dtype).min)[:, None, None]
        return masks if self.mixed else masks["all"]
