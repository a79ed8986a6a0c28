"""Attention masks for requests at different positions, in the form that a model's `forward` uses unchanged."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from puzzle_ray.errors import ConfigError


def unserved_layers(config: PreTrainedConfig) -> list[str]:
    """The types of a model's layers that need another kind of mask than `AttentionMasks` makes."""
    # GPT-Neo has `attention_layers`. Its local layers compute the window themselves, from the longest row.
    kinds = {*(getattr(config, "layer_types", None) or ()), *getattr(config, "attention_layers", ())}
    return sorted(kinds - {"full_attention", "sliding_attention", "global"})


class AttentionMasks:
    """Additive attention masks for new tokens at given positions of their rows.

    transformers uses a 4-D mask as it is. Models that mix full and sliding-window layers take a dict by layer type. Raises ConfigError
    for layers that need another kind of mask.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        self._dtype = dtype
        window: int | None = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ())
        if unknown := unserved_layers(config):
            problem = f"has layers of type {', '.join(unknown)}"
            raise ConfigError("model", problem, "the engine serves full and sliding-window attention")
        self._mixed = "sliding_attention" in kinds
        windows = {"full_attention": None, "sliding_attention": window}
        self._windows = windows if self._mixed else {"all": None if kinds else window}

    def __call__(self, positions: Tensor, kv_length: int) -> Tensor | dict[str, Tensor]:
        """Masks `[B, 1, T, kv_length]` for new tokens at `positions` `[B, T]`: 0 where a token looks, else the dtype's minimum."""
        seen, mine = torch.arange(kv_length, device=positions.device), positions[:, :, None]
        masks = {}
        for kind, window in self._windows.items():
            hidden = seen > mine
            if window is not None:
                hidden |= seen <= mine - window
            zeros = torch.zeros(hidden.shape, dtype=self._dtype, device=positions.device)
            masks[kind] = zeros.masked_fill_(hidden, torch.finfo(self._dtype).min)[:, None]
        return masks if self._mixed else masks["all"]
