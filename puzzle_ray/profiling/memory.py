"""Bytes of weights and of KV cache, counted on real modules and real cache tensors. They are exact, not estimated.

Weights are parameters. A parameter counts once, however many modules share it. KV is what must be kept per token of a sequence.
A layer without attention counts tokens by a `[batch, 1, tokens, 1]` stub (see `puzzle_ray.surgery.subblocks`). The stub holds no keys or
values, and a server need not store it, so it does not count.
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
from puzzle_ray.errors import ParentError
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.models.checkpoint import first_line
from puzzle_ray.models.rope import never_growing
from puzzle_ray.surgery.kv_cache import cache_from

_PROBE_TOKENS = 2


@dataclass(frozen=True)
class Weights:
    """The size of some modules, in the dtypes that they have."""

    weight_bytes: int
    num_params: int


def weights_of(parameters: Iterable[Tensor]) -> Weights:
    """The size of parameters, each distinct one counted once."""
    distinct = {id(parameter): parameter for parameter in parameters}.values()
    return Weights(sum(p.numel() * p.element_size() for p in distinct), sum(p.numel() for p in distinct))


def subblock_modules(layer: nn.Module, kind: SubblockKind, descriptor: Descriptor) -> list[nn.Module]:
    """One half of a layer: its main module, then its norms."""
    return [layer.get_submodule(name) for name in (descriptor.module(kind), *descriptor.norms(kind))]


def _subblock_parameters(layer: nn.Module, kind: SubblockKind, descriptor: Descriptor) -> list[Tensor]:
    return [parameter for module in subblock_modules(layer, kind, descriptor) for parameter in module.parameters()]


def subblock_weights(layer: nn.Module, kind: SubblockKind, descriptor: Descriptor) -> Weights:
    """The size of one half of a layer: the attention or the FFN, with its norms."""
    return weights_of(_subblock_parameters(layer, kind, descriptor))


def fixed_weights(model: nn.Module, descriptor: Descriptor) -> Weights:
    """The size of what is in no subblock: embedding, final norm and head. A tied head is the embedding."""
    layers: Any = model.get_submodule(descriptor.layers)
    in_subblocks = {id(p) for layer in layers for kind in KINDS for p in _subblock_parameters(layer, kind, descriptor)}
    return weights_of(p for p in model.parameters() if id(p) not in in_subblocks)


@dataclass(frozen=True)
class KeptTokens:
    """What one layer keeps of a sequence: `bytes_each` per token. With a sliding window, only the last `at_most` tokens are kept."""

    bytes_each: int
    at_most: int | None = None

    def of(self, tokens: int) -> int:
        """The number of a sequence's tokens that are kept."""
        return tokens if self.at_most is None else min(tokens, self.at_most)

    def in_dtype(self, dtype: str) -> KeptTokens:
        """The same in a cache of `dtype`. For fp8, models are built in 16 bits, so bytes are halved."""
        return replace(self, bytes_each=self.bytes_each // 2) if dtype == "fp8" else self

    def bytes_per_token(self, tokens: int) -> int:
        """The bytes kept of a sequence of `tokens` tokens, divided by its tokens and rounded up."""
        return -(-self.bytes_each * self.of(tokens) // tokens)


@torch.inference_mode()
def kept_tokens(model: Any) -> tuple[KeptTokens, ...]:
    """What every layer keeps, read from the model's own cache after a forward. Any device will do, `meta` too.

    Raises ParentError for a model of shapes only that cannot run: its config's sizes contradict each other.
    """
    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device=model.device)
    try:
        with never_growing(model):
            layers = cache_from(model(ids, use_cache=True, logits_to_keep=1)).layers
    except RuntimeError as error:
        if model.device.type != "meta":
            raise
        problem = f"a model of its config.json cannot run ({first_line(error)})"
        raise ParentError("parent", problem, "take config.json as the model was published") from error
    return tuple(_kept(layer) for layer in layers)


def _kept(layer: Any) -> KeptTokens:
    """From a cache layer, whose keys and values are `[batch, num_key_value_heads, tokens, head_dim]`. A window of W keeps W - 1 tokens."""
    keys, values = layer.keys, layer.values
    if keys.shape[1] * keys.shape[3] == 1:  # the token-counting stub
        return KeptTokens(0)
    window = getattr(layer, "sliding_window", None)
    each = (keys.numel() * keys.element_size() + values.numel() * values.element_size()) // keys.shape[2]
    return KeptTokens(each, None if window is None else window - 1)


def kv_bytes_per_token(model: Any, tokens: int) -> tuple[int, ...]:
    """Per layer, the cache bytes per token of a sequence of `tokens` tokens. 0 for a layer that keeps nothing."""
    return tuple(layer.bytes_per_token(tokens) for layer in kept_tokens(model))


def model_memory_mib(model: Any, scenario: Scenario) -> float:
    """Weights, and the KV cache of the whole batch at its full length."""
    return (weights_of(model.parameters()).weight_bytes + kv_cache_bytes(model, scenario)) / MIB


def kv_cache_bytes(model: Any, scenario: Scenario) -> int:
    """The KV cache of the whole batch at its full length."""
    tokens = scenario.kv_tokens_per_sequence
    return sum(kv_bytes_per_token(model, tokens)) * scenario.batch_size * tokens


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is active, until they are freed."""

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
    """The most bytes that a prefill's tensors take at once besides the weights, without a KV cache.

    `build` makes the model. Building and prefill are done with shapes only, so nothing is allocated or computed. Kernels are those of
    the CPU, so attention counts as one fused kernel. The memory that kernels use inside themselves does not count.
    """
    with FakeTensorMode(), torch.inference_mode():
        model, ids = build(), torch.zeros(batch_size, tokens, dtype=torch.long)
        with never_growing(model):
            return peak_of(lambda: model(ids, use_cache=False, logits_to_keep=1))


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes of the tensors that some work makes, at once. Use it inside of `FakeTensorMode`."""
    with _Live() as live:
        work()
    return live.peak
