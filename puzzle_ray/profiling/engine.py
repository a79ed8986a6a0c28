"""Engines run models and time them. An engine is one file in `engines/` that defines `ENGINE`."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any, Protocol

import numpy as np

from puzzle_ray.artifacts import LayerChoice, Scenario
from puzzle_ray.errors import ConfigError
from puzzle_ray.plugins import Foreign, declared, did_you_mean, load_plugin, plugin_source
from puzzle_ray.profiling.devices import device_of
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.progress import Bar

Samples = tuple[float, ...]
Series = np.ndarray[Any, np.dtype[np.float64]]  # one value per round


@dataclass(frozen=True)
class Timing:
    """The times of one model in one scenario. There is a sample per repeat.

    A prefill sample is the prefill of the whole batch's prompts. A decode sample is the mean of the decode steps after it.
    """

    prefill_samples_ms: Samples
    decode_samples_ms: Samples

    @property
    def prefill_ms(self) -> float:
        return median(self.prefill_samples_ms)

    @property
    def decode_ms(self) -> float:
        return median(self.decode_samples_ms)

    @property
    def prefill_spread_ms(self) -> float:
        return spread(self.prefill_samples_ms)

    @property
    def decode_spread_ms(self) -> float:
        return spread(self.decode_samples_ms)


def spread(samples: Sequence[float] | Series) -> float:
    """Half the inter-quartile range."""
    low, high = np.quantile(samples, (0.25, 0.75))
    return float(high - low) / 2


class Engine(Protocol):
    """What runs a model and times it. `use_gpu` selects the device: the GPU or the CPU.

    An engine may have more members:
    - `estimated = True`, where times are computed instead of measured.
    - `configured(config)`, where the engine has settings. It returns the engine for these settings, or raises ConfigError.
    - `time_stacks(task, model_config, config, bar)` in place of `build` and `time_once`, where the engine runs one model at a time. It
      returns the StackTimings of stacks that stand on one layer of the parent's own.
    - `base_layers`, where `build` adds so many layers of the parent's own to those that it is asked for.
    - `check(task, model_config)`, where the engine cannot run every shape. It raises ConfigError or ParentError, and is called before
      a run begins.
    """

    name: str

    def version(self) -> str:
        """The versions of everything that decides how fast the engine is."""

    def device_name(self, use_gpu: bool = False) -> str:
        """The kind of device that is measured, on a CPU with the number of threads of this process.

        It is asked before anything is built: name and version identify a profile. Measurements of two kinds are never mixed.
        """

    def facts(self, use_gpu: bool = False) -> dict[str, Any]:
        """What else identifies the measurement, such as driver and clocks. JSON-able."""

    def build(self, config: Any, choices: Sequence[LayerChoice], dtype: str, use_gpu: bool = False, like: Any = None) -> Any:
        """A model of random weights. It may share with the model `like` what is in no layer. Raises ProfileError."""

    def time_once(self, model: Any, scenario: Scenario) -> tuple[float, float]:
        """(prefill_ms, decode_ms) of one batch. The scenario has no `lengths`."""


@lru_cache(maxsize=1)
def _engines() -> dict[str, Engine]:
    engines: list[Engine] = declared("puzzle_ray.profiling.engines", "ENGINE")
    return {engine.name: engine for engine in engines}


def find_engine(name: str) -> Engine:
    """The engine of that name, or behind a dotted path `package.module:ATTRIBUTE`. Raises ConfigError."""
    if ":" in name:
        engine: Engine = load_plugin(name, "profile.engine", "engine")
        missing = [word for word in ("name", "version", "device_name", "facts") if not hasattr(engine, word)]
        if missing:
            problem = f"{name!r} is no engine: it lacks {', '.join(missing)}"
            raise ConfigError("profile.engine", problem, "see puzzle_ray.profiling.engine.Engine")
        return engine
    if name not in _engines():
        raise ConfigError("profile.engine", f"unknown engine {name!r}", did_you_mean(name, _engines()))
    return _engines()[name]


def engine_source(name: str) -> dict[str, str]:
    """What identifies an engine that is not of this package, besides its version; nothing for one of ours."""
    return plugin_source(name, find_engine(name), where="profile.engine")


def engine_of(config: ProfileConfig) -> Engine:
    """The engine that a config names, with the config's settings. Raises ConfigError."""
    engine = find_engine(config.engine)
    configured = getattr(engine, "configured", None)
    if configured is None:
        return engine
    made: Any = configured(config)
    return engine.again(made) if isinstance(engine, Foreign) else made


@dataclass(frozen=True)
class Target:
    """What a profile is of: the kind of device, on a CPU with the threads that are computed with, and the engine's version."""

    device: str
    engine_version: str

    def __str__(self) -> str:
        return f"{self.engine_version} on {self.device}"

    def sources(self) -> dict[str, str]:
        """What a profile of it is identified by."""
        return {"engine": self.engine_version, "target": self.device}


def target_here(config: ProfileConfig, num_threads: int) -> Target:
    """What this process would measure with `num_threads` threads. Raises ConfigError, or ProfileError where the device is missing."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)  # on a CPU they are part of the device's name
    try:
        engine = engine_of(config)
        return Target(engine.device_name(config.num_gpus > 0), engine.version())
    finally:
        torch.set_num_threads(before)


def depends_on_node(config: ProfileConfig) -> bool:
    """Whether a profile depends on the node that makes it: all do but estimates for a device that is given by name or in figures."""
    if not is_estimate(find_engine(config.engine)):
        return True
    return config.device is not None and device_of(config.device) is None  # the CPU at hand


def is_estimate(engine: Engine) -> bool:
    """Whether an engine's times are computed instead of measured."""
    return bool(getattr(engine, "estimated", False))


def profile_summary(facts: Mapping[str, Any]) -> str:
    """One line about a finished profile, from the facts of its artifact; empty where it was measured."""
    if not facts["estimated"]:
        return ""
    return f"costs are ESTIMATED by {facts['engine']} for {facts['device']}, not measured"


def mean_over_lengths(scenario: Scenario, samples: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(prefill_ms, decode_ms) of a mean request, from a sample for every kind of request in `scenario.shapes`.

    They are such that one prefill and `output_tokens - 1` steps take as long as the requests take on average.
    """
    shares = [share for _, share in scenario.shapes]
    steps = [share * (shape.output_tokens - 1) for shape, share in scenario.shapes]
    prefill_ms = math.fsum(share * ms for share, (ms, _) in zip(shares, samples, strict=True))
    decode_ms = math.fsum(n * ms for n, (_, ms) in zip(steps, samples, strict=True))
    return prefill_ms, decode_ms / math.fsum(steps) if any(steps) else 0.0


def measure_side_by_side(
    models: Mapping[str, Any], scenario: Scenario, repeats: int, engine: Engine | None = None, bar: Bar | None = None
) -> dict[str, Timing]:
    """Times models in turn: one warm-up of each, then `repeats` rounds over all of them, every round in another order.

    So a machine that becomes slower meanwhile is slower for all models. Sample i of every model is from round i.
    """
    engine = engine or find_engine("torch")
    order = list(models)
    shuffle = random.Random(0).shuffle
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for round_ in range(repeats + 1):
        shuffle(order)
        for name in order:
            sample = mean_over_lengths(scenario, [engine.time_once(models[name], shape) for shape, _ in scenario.shapes])
            if round_ > 0:  # the first warms up: allocator, threads, kernels chosen at first use
                samples[name].append(sample)
            if bar is not None:
                bar.advance()
    return {name: Timing(tuple(s[0] for s in own), tuple(s[1] for s in own)) for name, own in samples.items()}
