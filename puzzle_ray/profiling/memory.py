"""Bytes of weights and of KV cache, counted on real modules and real cache tensors: exact, not estimated.

Weights are parameters, each counted once however many modules share it. KV is what must be kept per token of a sequence. The
`[batch, 1, tokens, 1]` stub by which a layer without attention counts tokens (see `puzzle_ray.modules`) holds no keys or values
and is no KV: a server need not store it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from puzzle_ray.artifacts import KINDS, MIB, Scenario, SubblockKind
from puzzle_ray.families import Descriptor

_PROBE_TOKENS = 2


@dataclass(frozen=True)
class Weights:
    """Size of some modules in the dtypes they have."""

    weight_bytes: int
    num_params: int


def weights(parameters: Iterable[Tensor]) -> Weights:
    """Every distinct parameter once."""
    distinct = {id(parameter): parameter for parameter in parameters}.values()
    return Weights(sum(p.numel() * p.element_size() for p in distinct), sum(p.numel() for p in distinct))


def _subblock_parameters(layer: nn.Module, kind: SubblockKind, descriptor: Descriptor) -> list[Tensor]:
    names = (descriptor.module(kind), *descriptor.norms(kind))
    return [parameter for name in names for parameter in layer.get_submodule(name).parameters()]


def subblock_weights(layer: nn.Module, kind: SubblockKind, descriptor: Descriptor) -> Weights:
    """One half of a layer: the attention or the FFN, with its norms."""
    return weights(_subblock_parameters(layer, kind, descriptor))


def fixed_weights(model: nn.Module, descriptor: Descriptor) -> Weights:
    """All that is in no subblock: embedding, final norm, head (a tied head is the embedding)."""
    layers: Any = model.get_submodule(descriptor.layers)
    in_subblocks = {id(p) for layer in layers for kind in KINDS for p in _subblock_parameters(layer, kind, descriptor)}
    return weights(p for p in model.parameters() if id(p) not in in_subblocks)


@torch.inference_mode()
def kv_bytes_per_token(model: Any, tokens: int) -> tuple[int, ...]:
    """Per layer, the bytes a token of one sequence of `tokens` takes in the cache, rounded up; 0 for a layer that keeps nothing.

    A layer that looks back W tokens keeps W - 1, which are shared out over the whole sequence.
    """
    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device=model.device)
    layers = model(ids, use_cache=True, logits_to_keep=1).past_key_values.layers
    return tuple(_bytes_per_token(layer, tokens) for layer in layers)


def _bytes_per_token(layer: Any, tokens: int) -> int:
    """`layer.keys` and `values` are `[batch, KV heads, tokens, head_dim]`."""
    keys, values = layer.keys, layer.values
    if keys.shape[1] * keys.shape[3] == 1:  # the token-counting stub
        return 0
    kept = min(tokens, getattr(layer, "sliding_window", tokens + 1) - 1)
    each = (keys.numel() * keys.element_size() + values.numel() * values.element_size()) // keys.shape[2]
    return -(-each * kept // tokens)


def model_memory_mib(model: Any, scenario: Scenario) -> float:
    """Weights and the KV cache of the whole batch at its full length."""
    kv_bytes = sum(kv_bytes_per_token(model, scenario.tokens_per_sequence)) * scenario.batch_size * scenario.tokens_per_sequence
    return (weights(model.parameters()).weight_bytes + kv_bytes) / MIB
