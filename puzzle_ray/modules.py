"""The modules that stand in for an attention or an FFN. They take what transformers hands to the ones they replace.

A layer without attention still tells the cache how many tokens it has seen, by a `[batch, 1, tokens, 1]` stub: transformers reads
the length of a sequence from the first layer's cache, and a layer that never writes there makes positions silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _count_tokens(past_key_values: Any, layer_idx: int, hidden_states: Tensor) -> None:
    if past_key_values is not None:
        stub = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
        past_key_values.update(stub, stub, layer_idx)


class NoopAttention(nn.Module):
    """Adds nothing to the residual."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, **_: Any) -> tuple[Tensor, None]:
        _count_tokens(past_key_values, self.layer_idx, hidden_states)
        return hidden_states.new_zeros(()), None


class LinearAttention(nn.Module):
    """One `[hidden_size, hidden_size]` matrix on each token alone."""

    def __init__(self, hidden_size: int, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.linear_attn = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, **_: Any) -> tuple[Tensor, None]:
        _count_tokens(past_key_values, self.layer_idx, hidden_states)
        return self.linear_attn(hidden_states), None


class NoopFFN(nn.Module):
    """Adds nothing to the residual."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.new_zeros(())


class LinearFFN(nn.Module):
    """One `[hidden_size, hidden_size]` matrix."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = self.linear_mlp(hidden_states)
        return out


def resize_linear(linear: nn.Linear, in_features: int, out_features: int) -> nn.Linear:
    """An uninitialised linear layer of another size, with the same dtype, device and presence of a bias."""
    weight = linear.weight
    return nn.utils.skip_init(
        nn.Linear, in_features, out_features, bias=linear.bias is not None, dtype=weight.dtype, device=weight.device
    )


@torch.no_grad()
def copy_(target: Tensor, source: Tensor) -> None:
    """Writes `source` into a parameter, whatever its dtype; shapes must agree exactly."""
    if target.shape != source.shape:
        raise ValueError(f"shapes differ: {tuple(target.shape)} and {tuple(source.shape)}")
    target.copy_(source)
