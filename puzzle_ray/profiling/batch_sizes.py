"""The batch sizes worth profiling: numbers in place of `profile.batch_sizes: auto`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from puzzle_ray.artifacts import FIXED, KINDS, MIB, PARENT, LayerSpace, SearchSpace, SubblockKind
from puzzle_ray.errors import ConfigError
from puzzle_ray.profiling.devices import device_of
from puzzle_ray.profiling.measure import SubblockSize, activation_bytes, profile_tasks, subblock_sizes
from puzzle_ray.profiling.scenarios import AUTO
from puzzle_ray.profiling.settings import ProfileConfig

SizesByType = dict[str, dict[tuple[str, str], SubblockSize]]


def with_batch_sizes(config: ProfileConfig, model_config: Any, space: SearchSpace, limit_mib: float | None) -> ProfileConfig:
    """The config with numbers in place of `auto`.

    The batch sizes are all powers of two up to `max_batch_size` at which some child of the space fits in memory. The scenario's batch
    size, at which the parent is compared, is the largest of them at which the parent fits.
    Memory is the lower one of two numbers, where both are given. One is the device's: `memory_mib`, or a known device's own, less
    `reserved_mib` and the activations of a prefill. The other is `limit_mib`, which the search allows (`search.limits.memory_mib`).
    The device's number becomes the config's `memory_mib`, so that the search keeps whole children within it.
    Raises ConfigError where neither is known, or where the parent does not fit at all.
    """
    if config.batch_sizes != AUTO:
        return config
    device = device_of(config.device) if config.device is not None else None
    own_mib = config.memory_mib or (device.memory_mib if device else None)
    if own_mib is None and limit_mib is None:
        raise ConfigError("profile.batch_sizes", "auto needs to know how much memory there is", "set profile.memory_mib")
    numbers = config.model_copy(update={"batch_sizes": ()})
    by_type, tasks = _sizes_by_type(numbers, model_config, space), profile_tasks(space, numbers)

    def room_mib(size: int) -> float:
        if own_mib is None:
            return limit_mib or 0.0
        activations = max(activation_bytes(replace(task, batch_size=size), model_config, numbers) for task in tasks) / MIB
        return min(own_mib - config.reserved_mib - activations, limit_mib or math.inf)

    powers = [1 << i for i in range(config.max_batch_size.bit_length())]
    room = {size: room_mib(size) for size in powers}
    fits_child = [size for size in powers if _least_mib(by_type, space, config, size) <= room[size]]
    fits_parent = [size for size in fits_child if _parent_mib(by_type, space, config, size) <= room[size]]
    if not fits_parent:
        needed = _parent_mib(by_type, space, config, 1)
        problem = f"auto: the parent needs {needed:.1f} MiB at batch size 1 and there are {room[1]:.1f}"
        raise ConfigError("profile.batch_sizes", problem, "give profile.scenario.batch_size and profile.batch_sizes as numbers")
    scenario = replace(config.scenario, batch_size=fits_parent[-1])
    numbers_found = {
        "scenario": scenario,
        "batch_sizes": tuple(fits_child),
        "max_batch_size": fits_child[-1],
        "memory_mib": own_mib,
    }
    return config.model_copy(update=numbers_found)  # equal wherever different bounds lead to the same numbers


def _sizes_by_type(config: ProfileConfig, model_config: Any, space: SearchSpace) -> SizesByType:
    """Layer type -> (subblock, variant) -> its size."""
    tasks = profile_tasks(space, config)
    return {t.layer_type: {(s.subblock, s.variant): s for s in subblock_sizes(t, model_config, config)} for t in tasks}


def _size(by_type: SizesByType, layer: LayerSpace, kind: SubblockKind, variant: str) -> SubblockSize:
    return by_type[layer.layer_type][kind, layer.now.variant(kind) if variant == PARENT else variant]


def _mib(size: SubblockSize, config: ProfileConfig, batch_size: int) -> float:
    return (size.weight_bytes + batch_size * config.scenario.kv_tokens_per_sequence * size.kv_bytes_per_token) / MIB


def _least_mib(by_type: SizesByType, space: SearchSpace, config: ProfileConfig, batch_size: int) -> float:
    """Weights and KV cache of the smallest architecture."""
    layers = (
        min(_mib(_size(by_type, layer, kind, variant), config, batch_size) for variant in layer.variants(kind))
        for layer in space.layers
        for kind in KINDS
    )
    return _fixed_mib(by_type, config) + sum(layers)


def _parent_mib(by_type: SizesByType, space: SearchSpace, config: ProfileConfig, batch_size: int) -> float:
    """Weights and KV cache of the parent."""
    layers = (_mib(_size(by_type, layer, kind, PARENT), config, batch_size) for layer in space.layers for kind in KINDS)
    return _fixed_mib(by_type, config) + sum(layers)


def _fixed_mib(by_type: SizesByType, config: ProfileConfig) -> float:
    return _mib(next(iter(by_type.values()))[FIXED, FIXED], config, 0)
