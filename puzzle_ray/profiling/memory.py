"""Bytes of weights and of KV cache, counted on real modules and real cache tensors: exact, not estimated.

Weights are parameters, each counted once however many modules share it. KV is what must be kept per token of a sequence. The
`[batch, 1, tokens, 1]` stub by which a layer without attention counts tokens (see `puzzle_ray.surgery.subblocks`) holds no keys or values
and is no KV: a server need not store it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from puzzle_ray.artifacts import KINDS, MIB, Scenario, SubblockKind
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.surgery.kv_cache import cache_from

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


def subblock_modules(layer: nn.Module, kind: SubblockKind, descriptor: Descriptor) -> list[nn.Module]:
    """The main module of one half of a layer, then its norms."""
    return [layer.get_submodule(name) for name in (descriptor.module(kind), *descriptor.norms(kind))]


def _subblock_parameters(layer: nn.Module, kind: SubblockKind, descriptor: Descriptor) -> list[Tensor]:
    return [parameter for module in subblock_modules(layer, kind, descriptor) for parameter in module.parameters()]


def subblock_weights(layer: nn.Module, kind: SubblockKind, descriptor: Descriptor) -> Weights:
    """One half of a layer: the attention or the FFN, with its norms."""
    return weights(_subblock_parameters(layer, kind, descriptor))


def fixed_weights(model: nn.Module, descriptor: Descriptor) -> Weights:
    """All that is in no subblock: embedding, final norm, head (a tied head is the embedding)."""
    layers: Any = model.get_submodule(descriptor.layers)
    in_subblocks = {id(p) for layer in layers for kind in KINDS for p in _subblock_parameters(layer, kind, descriptor)}
    return weights(p for p in model.parameters() if id(p) not in in_subblocks)


@dataclass(frozen=True)
class KeptTokens:
    """What one layer keeps of a sequence: `bytes_each` per token, of the last `at_most` tokens where it looks back only so far."""

    bytes_each: int
    at_most: int | None = None

    def of(self, tokens: int) -> int:
        """How many of a sequence's tokens are kept."""
        return tokens if self.at_most is None else min(tokens, self.at_most)

    def in_dtype(self, dtype: str) -> KeptTokens:
        """The same in a cache of `dtype`: models are built in 16 bits where it is fp8."""
        return replace(self, bytes_each=self.bytes_each // 2) if dtype == "fp8" else self

    def bytes_per_token(self, tokens: int) -> int:
        """What is kept of `tokens` tokens, shared out over all of them, rounded up."""
        return -(-self.bytes_each * self.of(tokens) // tokens)


@torch.inference_mode()
def kept_tokens(model: Any) -> tuple[KeptTokens, ...]:
    """Per layer, as the model's own cache has it after a forward; on any device, `meta` among them."""
    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device=model.device)
    layers = cache_from(model(ids, use_cache=True, logits_to_keep=1)).layers
    return tuple(_kept(layer) for layer in layers)


def _kept(layer: Any) -> KeptTokens:
    """`layer.keys` and `values` are `[batch, KV heads, tokens, head_dim]`; a layer that looks back W tokens keeps W - 1."""
    keys, values = layer.keys, layer.values
    if keys.shape[1] * keys.shape[3] == 1:  # the token-counting stub
        return KeptTokens(0)
    window = getattr(layer, "sliding_window", None)
    each = (keys.numel() * keys.element_size() + values.numel() * values.element_size()) // keys.shape[2]
    return KeptTokens(each, None if window is None else window - 1)


def kv_bytes_per_token(model: Any, tokens: int) -> tuple[int, ...]:
    """Per layer, the bytes a token of one sequence of `tokens` takes in the cache; 0 for a layer that keeps nothing."""
    return tuple(layer.bytes_per_token(tokens) for layer in kept_tokens(model))


def model_memory_mib(model: Any, scenario: Scenario) -> float:
    """Weights and the KV cache of the whole batch at its full length."""
    tokens = scenario.kv_tokens_per_sequence
    kv_bytes = sum(kv_bytes_per_token(model, tokens)) * scenario.batch_size * tokens
    return (weights(model.parameters()).weight_bytes + kv_bytes) / MIB


class _Live(TorchDispatchMode):
    """Follows the bytes of all storages that appear while it is on, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes_of: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in before | self.bytes_of.keys():
                storage = x.untyped_storage()
                self.bytes_of[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.bytes_of.pop, id(storage), None)
        self.peak = max(self.peak, sum(self.bytes_of.values()))
        return out


def peak_bytes(build: Callable[[], Any], batch_size: int, tokens: int) -> int:
    """The most bytes that tensors of a prefill take at once beside the weights, without a KV cache.

    `build` makes the model, and both are done with shapes only: nothing is allocated or computed. Kernels are the CPU's, so attention
    is counted as a fused kernel; what kernels need inside themselves is not.
    """
    with FakeTensorMode(), torch.inference_mode():
        model, ids = build(), torch.zeros(batch_size, tokens, dtype=torch.long)
        with _Live() as live:
            model(ids, use_cache=False, logits_to_keep=1)
    return live.peak
