"""The `roofline` engine estimates times from a device's datasheet, for devices that are not at hand. Nothing is timed.

Every kernel of a forward takes the longer one of its arithmetic and its memory traffic, plus `kernel_us`:

    max(flops / (peak x compute efficiency), bytes / (bandwidth x bandwidth efficiency)) + kernel_us

Kernels are read from the model's own modules, which are built without memory. So every family and every variant is known by its shapes:
- Each weight matrix is one product on every token.
- Each norm reads and writes its features.
- What lies between products (activations, quantisation, rotary, the residual) reads their outputs and writes their inputs.
- Attention adds query x key and scores x value over the tokens that each token sees, and the traffic of the KV cache.
- Outside layers there are the embedding's rows, the head for one position of each sequence, and `step_us` per step for scheduling and
  sampling.

With dtype fp8, a byte each is counted for weights in layers, inputs of their products and the KV cache. Outputs, attention's
arithmetic, embedding and head stay bfloat16.
Not modelled: kernels of odd shapes, fusion other than attention's, several GPUs, power limits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from puzzle_ray.artifacts import KINDS, MIB, LayerChoice, Scenario, SubblockKind
from puzzle_ray.errors import ConfigError
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.models.child import new_child
from puzzle_ray.models.describe import describe
from puzzle_ray.profiling.devices import THIS_CPU, Device, device_of
from puzzle_ray.profiling.machine import cpu_name
from puzzle_ray.profiling.memory import KeptTokens, kept_tokens, subblock_modules
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.surgery.projections import linear_sizes
from puzzle_ray.version import __version__

WIDE = "bfloat16"  # the dtype of what stays out of fp8 where the rest is fp8


@dataclass(frozen=True)
class Rates:
    """How long work takes on a device at one dtype. `element_bytes` is for weights, inputs of products and the KV cache."""

    device: Device
    dtype: str

    @property
    def element_bytes(self) -> int:
        return {"float32": 4, "fp8": 1}.get(self.dtype, 2)

    @property
    def output_bytes(self) -> int:
        return max(2, self.element_bytes)

    def kernel_ms(self, flops: float, traffic_bytes: float, dtype: str | None = None) -> float:
        device = self.device
        compute_s = flops / (1e12 * device.tflops[dtype or self.dtype] * device.compute_efficiency)
        memory_s = traffic_bytes / (1e9 * device.bandwidth_gb_s * device.bandwidth_efficiency)
        return 1e3 * max(compute_s, memory_s) + 1e-3 * device.kernel_us


@dataclass(frozen=True)
class Subblock:
    """The shapes of one half of a layer.

    `matrices` are its weights [rows out, columns in]. `norms` are the features of its norms. An attention also has its width (query
    heads x head size) and what it keeps of a token.
    """

    matrices: tuple[tuple[int, int], ...]
    norms: tuple[int, ...]
    attention_width: int = 0
    kept: KeptTokens = KeptTokens(0)

    @classmethod
    def of(cls, layer: nn.Module, kind: SubblockKind, descriptor: Descriptor, config: Any, kept: KeptTokens) -> Subblock:
        modules = [part for module in subblock_modules(layer, kind, descriptor) for part in module.modules()]
        parameters = {id(p): (name, p) for part in modules for name, p in part.named_parameters(recurse=False)}.values()
        turned = {id(part.weight) for part in modules if isinstance(part, Conv1D)}
        shapes = ((p.shape[0], p[0].numel(), id(p) in turned) for _, p in parameters if p.dim() > 1)
        matrices = tuple((columns, rows) if turn else (rows, columns) for rows, columns, turn in shapes)
        norms = tuple(p.numel() for name, p in parameters if p.dim() == 1 and name == "weight")
        if kind == "ffn" or not kept.bytes_each:
            return cls(matrices, norms)
        output = getattr(descriptor.core(layer, kind), descriptor.output, None)
        if isinstance(output, nn.Linear | Conv1D):
            return cls(matrices, norms, linear_sizes(output)[0], kept)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(matrices, norms, config.num_attention_heads * head_dim, kept)

    def pass_ms(self, rates: Rates, hidden_size: int, sequences: int, new_tokens: int, seen_tokens: float) -> float:
        """The time of `new_tokens` tokens of every sequence. A token sees `seen_tokens` tokens on average, itself included."""
        if not self.matrices and not self.kept.bytes_each:
            return 0.0
        tokens, element, output = sequences * new_tokens, rates.element_bytes, rates.output_bytes
        total = 0.0
        for rows, columns in self.matrices:
            moved = rows * columns * element + tokens * (columns * element + rows * output)
            total += rates.kernel_ms(2.0 * rows * columns * tokens, moved)
        for features in self.norms:
            total += rates.kernel_ms(0, tokens * 2 * features * output)
        between = sum(rows * output + columns * element for rows, columns in self.matrices)
        total += rates.kernel_ms(0, tokens * (between + 2 * hidden_size * output))  # the residual is read and written too
        if self.kept.bytes_each:
            cached = seen_tokens if new_tokens == 1 else 2 * new_tokens  # a prefill writes what it reads
            traffic = sequences * cached * self.kept.bytes_each + tokens * 2 * self.attention_width * output
            wide = WIDE if rates.dtype == "fp8" else rates.dtype
            total += rates.kernel_ms(4.0 * self.attention_width * tokens * seen_tokens, traffic, wide)
        return total


def _seen(kept: KeptTokens, first: int, last: int) -> float:
    """How many tokens the tokens `first` to `last` of a sequence (counted from 1) see on average."""
    places = np.arange(first, last + 1)
    return float((places if kept.at_most is None else np.minimum(places, kept.at_most + 1)).mean())


class RooflineEngine:
    """Computes times. Models are built on the `meta` device, where they take no memory."""

    name = "roofline"
    estimated = True

    def __init__(self, rates: Rates | None = None, named: str = "") -> None:
        self._rates, self._named = rates, named
        self._kept: WeakKeyDictionary[nn.Module, list[KeptTokens]] = WeakKeyDictionary()

    @property
    def rates(self) -> Rates:
        if self._rates is None:
            raise ConfigError("profile.device", "the roofline engine has no device", "set profile.device, such as H100")
        return self._rates

    def configured(self, config: ProfileConfig) -> RooflineEngine:
        """The engine for the config's device and dtype. Raises ConfigError where the device has no such dtype."""
        device = device_of(config.device or "")
        if device is None:
            threads = torch.get_num_threads()
            return RooflineEngine(Rates(this_cpu(config.dtype, threads), config.dtype), f"{cpu_name()}, {threads} threads")
        for dtype in {config.dtype, WIDE if config.dtype == "fp8" else config.dtype}:
            if dtype not in device.tflops:
                known = ", ".join(device.tflops)
                raise ConfigError("profile.dtype", f"device {device.name} has no rate for {dtype}", f"it has {known}")
        return RooflineEngine(Rates(device, config.dtype), device.name)

    def version(self) -> str:
        return f"puzzle_ray {__version__}"

    def device_name(self, use_gpu: bool = False) -> str:
        return f"{self._named} (estimated)"

    def facts(self, use_gpu: bool = False) -> dict[str, Any]:
        """The assumptions that the estimate rests on."""
        return asdict(self.rates.device)

    def build(self, config: Any, choices: Sequence[LayerChoice], dtype: str, use_gpu: bool = False, like: Any = None) -> Any:
        with torch.device("meta"):
            return new_child(config, choices, getattr(torch, WIDE if dtype == "fp8" else dtype)).eval()

    def time_once(self, model: Any, scenario: Scenario) -> tuple[float, float]:
        """(prefill_ms, decode_ms): one forward of the prompts, and the mean of the decode steps after it."""
        prompt, answer = int(scenario.input_tokens), int(scenario.output_tokens)
        prefill_ms = self._forward_ms(model, scenario.batch_size, prompt, lambda kept: _seen(kept, 1, prompt))
        if answer == 1:
            return prefill_ms, 0.0
        step_ms = self._forward_ms(model, scenario.batch_size, 1, lambda kept: _seen(kept, prompt + 1, prompt + answer - 1))
        return prefill_ms, step_ms

    def _forward_ms(self, model: Any, sequences: int, new_tokens: int, seen: Callable[[KeptTokens], float]) -> float:
        rates, descriptor, config = self.rates, describe(model.config), model.config
        if model not in self._kept:
            self._kept[model] = [layer.in_dtype(rates.dtype) for layer in kept_tokens(model)]
        total = self._fixed_ms(model, descriptor, sequences, new_tokens)
        for layer, kept in zip(model.get_submodule(descriptor.layers), self._kept[model], strict=True):
            for kind in KINDS:
                subblock = Subblock.of(layer, kind, descriptor, config, kept)
                total += subblock.pass_ms(rates, config.hidden_size, sequences, new_tokens, seen(kept))
        return total

    def _fixed_ms(self, model: Any, descriptor: Descriptor, sequences: int, new_tokens: int) -> float:
        """What is in no layer: embedding, learned positions, final norm, the head on one position of each sequence, and `step_us`."""
        rates, hidden_size = self.rates, model.config.hidden_size
        rows = sequences * new_tokens * hidden_size * rates.output_bytes
        lookups = 2 if descriptor.positions else 1
        total = 1e-3 * rates.device.step_us + (lookups + 1) * rates.kernel_ms(0, 2 * rows)
        wide, (vocabulary, features) = (
            WIDE if rates.dtype == "fp8" else rates.dtype,
            model.get_submodule(descriptor.head).weight.shape,
        )
        traffic = rates.output_bytes * (vocabulary * features + sequences * (vocabulary + features))
        return total + rates.kernel_ms(2.0 * vocabulary * features * sequences, traffic, wide)


@lru_cache(maxsize=4)
def this_cpu(dtype: str, threads: int) -> Device:
    """This machine's CPU, as this process uses it with its threads: the best times of a few products, copies and tiny operations."""
    kind = getattr(torch, dtype)
    a, stream, little = torch.ones(1024, 1024, dtype=kind), torch.ones(1 << 24), torch.ones(1)
    product_s, copy_s = _best_s(lambda: a @ a), _best_s(lambda: stream.clone())
    memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB
    rates = {dtype: 2 * 1024**3 / product_s / 1e12}
    return Device(
        THIS_CPU, rates, 2 * stream.nbytes / copy_s / 1e9, memory_mib, 1.0, 1.0, 1e6 * _best_s(lambda: little + little), 0.0
    )


def _best_s(work: Callable[[], object], repeats: int = 10, enough_s: float = 1.0) -> float:
    seconds: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
        if sum(seconds) > enough_s:  # e.g. float16 on a CPU without it takes seconds per product
            break
    return min(seconds)


ENGINE = RooflineEngine()
