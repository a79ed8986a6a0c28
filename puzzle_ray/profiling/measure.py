"""What every subblock shape costs, from stacks of identical layers in real models of the family.

A model of k layers (a, f) takes T(k) = fixed + k c(a, f), where `fixed` (embedding, head, what a step costs besides its layers)
is the same for all. Two stacks of no-ops, n and 2n layers deep, tell it: fixed = 2 T(n) - T(2n). Every other stack is 2n deep,
and c = (T(2n) - fixed) / 2n: (T(2n) - T(n)) / n is a small difference of large times, with twice the error on a noisy CPU.

FFN f costs c(noop, f) - c(noop, noop), attention a costs c(a, parent) - c(noop, parent) + c(noop, noop). So the parent's two
halves add up to c(parent, parent), which was measured whole; the no-op FFN is free; the no-op attention carries a layer's
overhead. Attention is taken beside an FFN because it shares the CPU's caches with one wherever it runs: alone it looks cheap.

Where requests differ in length (`Scenario.lengths`), every run is one of each kind, and a sample their mean by weight.

All stacks of an item are timed in turn, round after round, each round in another order. Costs are formed within a round, in
which the machine is the same for all, and their median over rounds is kept. This module says what is independent (plan, measure,
merge), not where it runs. Engines that put every stack on a layer of the parent's own have its cost in `fixed`; it is taken off.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from puzzle_ray.artifacts import (
    FIXED,
    KINDS,
    MIB,
    PARENT,
    LayerChoice,
    Profile,
    ProfileRow,
    Scenario,
    SearchSpace,
    SubblockKind,
    to_json,
)
from puzzle_ray.errors import ProfileError
from puzzle_ray.models.describe import describe
from puzzle_ray.profiling.engine import Series, Timing, engine_of, find_engine, is_estimate, measure_side_by_side, spread
from puzzle_ray.profiling.memory import Weights, fixed_weights, kept_tokens, peak_bytes, subblock_weights
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.progress import Bar, Progress
from puzzle_ray.store import Artifact

PROFILE_TABLE = "profile.parquet"
NOOP = "noop"
NOTHING = LayerChoice(NOOP, NOOP)


@dataclass(frozen=True)
class ProfileTask:
    """All shapes of one layer type at one batch size: what must be timed in turn to be comparable."""

    layer_type: str
    batch_size: int
    attention: tuple[str, ...]
    ffn: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"items/{self.layer_type}.batch_{self.batch_size}.json"

    def stacks(self, n: int) -> tuple[tuple[LayerChoice, int], ...]:
        """(layer, number of layers): no-ops n and 2n deep, then every FFN beside no attention, every attention beside an FFN."""
        pairs = [LayerChoice(NOOP, f) for f in self.ffn] + [LayerChoice(a, PARENT) for a in self.attention]
        return ((NOTHING, n), *((choice, 2 * n) for choice in dict.fromkeys([NOTHING, *pairs])))


def profile_tasks(space: SearchSpace, config: ProfileConfig) -> list[ProfileTask]:
    """One item per layer type and batch size; every distinct shape is in one of them."""
    assert config.batch_sizes != "auto", "batch sizes are still to be resolved"
    items = []
    for batch_size in sorted({config.scenario.batch_size, *config.batch_sizes}):
        for layer_type in dict.fromkeys(layer.layer_type for layer in space.layers):
            layers = [layer for layer in space.layers if layer.layer_type == layer_type]
            a, f = (tuple(dict.fromkeys(v for x in layers for v in x.variants(kind))) for kind in KINDS)
            items.append(ProfileTask(layer_type, batch_size, a, f))
    return items


def check_shapes(space: SearchSpace, model_config: Any, config: ProfileConfig) -> None:
    """Raises ConfigError or ParentError for a parent or a variant that the engine cannot run."""
    check = getattr(find_engine(config.engine), "check", None)
    if check is not None:
        for item in profile_tasks(space, config):
            check(item, model_config)


def runs_of(item: ProfileTask, config: ProfileConfig) -> int:
    """How many times `measure` runs a model, its warm-ups included."""
    return len(item.stacks(config.stack)) * (_repeats(config) + 1)


def _repeats(config: ProfileConfig) -> int:
    return 1 if is_estimate(find_engine(config.engine)) else config.repeats


@dataclass(frozen=True)
class StackTiming:
    """`num_layers` layers (attention, ffn) in a model."""

    attention: str
    ffn: str
    num_layers: int
    timing: Timing


@dataclass(frozen=True)
class SubblockSize:
    """What one subblock (or, as `fixed`, all that is in none) takes."""

    subblock: str
    variant: str
    weight_bytes: int
    num_params: int
    kv_bytes_per_token: int


@dataclass(frozen=True)
class Measurement:
    """All that was measured for an item, before anything is computed from it."""

    item: ProfileTask
    stacks: tuple[StackTiming, ...]
    sizes: tuple[SubblockSize, ...]
    engine_version: str
    device: str
    machine: Mapping[str, Any] = field(default_factory=dict)
    base_layers: int = 0  # of the parent's own, under every stack
    activation_bytes: int = 0  # of the parent's prefill, see `activation_bytes`

    @classmethod
    def from_json(cls, data: bytes) -> Measurement:
        raw = json.loads(data)
        item = raw["item"]
        item |= {"attention": tuple(item["attention"]), "ffn": tuple(item["ffn"])}
        stacks = [s | {"timing": Timing(*(tuple(v) for v in s["timing"].values()))} for s in raw["stacks"]]
        return cls(
            ProfileTask(**item),
            tuple(StackTiming(**s) for s in stacks),
            tuple(SubblockSize(**s) for s in raw["sizes"]),
            raw["engine_version"],
            raw["device"],
            raw["machine"],
            raw["base_layers"],
            raw["activation_bytes"],
        )


def stack_config(model_config: Any, layer_type: str, num_layers: int) -> Any:
    """The family's config with `num_layers` layers of one type."""
    config = copy.deepcopy(model_config)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [layer_type] * num_layers
    if getattr(config, "attention_layers", None) is not None:  # GPT-Neo's word for it
        config.attention_types, config.attention_layers = [[[layer_type], num_layers]], [layer_type] * num_layers
    return config


def measure(item: ProfileTask, model_config: Any, config: ProfileConfig, bar: Bar | None = None) -> Measurement:
    """Builds the item's stacks and times them. Raises ProfileError where the device is missing or too small."""
    engine, use_gpu, activations = engine_of(config), config.num_gpus > 0, activation_bytes(item, model_config, config)
    scenario = replace(config.scenario, batch_size=item.batch_size)
    _check_length(model_config, scenario)
    alone = getattr(engine, "time_stacks", None)
    if alone is not None:
        timed, sizes = alone(item, model_config, config, bar), sizes_of(item, model_config, config)
        about = (engine.version(), engine.device_name(use_gpu), engine.facts(use_gpu))
        return Measurement(item, tuple(timed), sizes, *about, 1, activations)
    stacks: dict[tuple[LayerChoice, int], Any] = {}
    try:
        for choice, depth in item.stacks(config.stack):
            like = next(iter(stacks.values()), None)
            shape = stack_config(model_config, item.layer_type, depth)
            stacks[choice, depth] = engine.build(shape, [choice] * depth, config.dtype, use_gpu, like)
        sizes = _sizes(item, model_config, {choice: model for (choice, _), model in stacks.items()}, config)
        named = {f"{choice.label} x {depth}": model for (choice, depth), model in stacks.items()}
        timings = measure_side_by_side(named, scenario, _repeats(config), engine, bar)
    except torch.OutOfMemoryError as error:
        raise ProfileError(
            "profile",
            f"{len(stacks)} models at batch size {item.batch_size} do not fit the GPU ({error})",
            "lower profile.stack or the batch size",
        ) from None
    timed = [StackTiming(c.attention, c.ffn, d, timings[f"{c.label} x {d}"]) for c, d in stacks]
    about = (engine.version(), engine.device_name(use_gpu), engine.facts(use_gpu))
    return Measurement(item, tuple(timed), sizes, *about, 0, activations)


def _check_length(model_config: Any, scenario: Scenario) -> None:
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions is not None and scenario.longest_tokens > positions:
        raise ProfileError(
            "profile.scenario",
            f"{scenario.longest_tokens} tokens in and out do not fit the parent's {positions} positions",
            "lower input_tokens or output_tokens",
        )


def sizes_of(item: ProfileTask, model_config: Any, config: ProfileConfig) -> tuple[SubblockSize, ...]:
    """What the item's shapes take, from models without memory: their parameters and caches are only shapes."""
    from puzzle_ray.models.child import new_child

    dtype = torch.bfloat16 if config.dtype == "fp8" else getattr(torch, config.dtype)
    shape = stack_config(model_config, item.layer_type, 1)
    with torch.device("meta"):
        stacks = {choice: new_child(shape, [choice], dtype).eval() for choice, _ in item.stacks(1)}
    return _sizes(item, model_config, stacks, config)


def activation_bytes(item: ProfileTask, model_config: Any, config: ProfileConfig) -> int:
    """The most that the longest prefill of the parent's own layers holds beside weights and KV cache; children have nothing larger."""
    from puzzle_ray.models.child import new_child

    dtype = "bfloat16" if config.dtype == "fp8" else config.dtype
    prompt = max(int(shape.input_tokens) for shape, _ in config.scenario.shapes)
    shape, layers = stack_config(model_config, item.layer_type, 2), [LayerChoice()] * 2  # deeper ones hold no more
    return peak_bytes(lambda: new_child(shape, layers, getattr(torch, dtype)).eval(), item.batch_size, prompt)


def _sizes(
    item: ProfileTask, model_config: Any, stacks: Mapping[LayerChoice, Any], config: ProfileConfig
) -> tuple[SubblockSize, ...]:
    """In fp8, models of 16 bits stand for what is half as large, but for embedding and head, which are not."""
    descriptor, tokens = describe(model_config), config.scenario.kv_tokens_per_sequence
    narrower = 2 if config.dtype == "fp8" else 1

    def size(kind: SubblockKind, variant: str, choice: LayerChoice) -> SubblockSize:
        model = stacks[choice]
        found = subblock_weights(model.get_submodule(descriptor.layers)[0], kind, descriptor)
        kv_bytes = kept_tokens(model)[0].in_dtype(config.dtype).bytes_per_token(tokens) if kind == "attention" else 0
        return SubblockSize(kind, variant, found.weight_bytes // narrower, found.num_params, kv_bytes)

    fixed: Weights = fixed_weights(next(iter(stacks.values())), descriptor)
    return (
        *(size("attention", a, LayerChoice(a, PARENT)) for a in item.attention),
        *(size("ffn", f, LayerChoice(NOOP, f)) for f in item.ffn),
        SubblockSize(FIXED, FIXED, fixed.weight_bytes, fixed.num_params, 0),
    )


def subblock_series(result: Measurement, phase: str) -> dict[tuple[str, str], Series]:
    """(subblock, variant), (`fixed`, `fixed`) among them -> its cost in ms in every round. `phase`: `prefill` or `decode`."""
    times: dict[tuple[LayerChoice, int], Series] = {}
    for s in result.stacks:
        samples = s.timing.prefill_samples_ms if phase == "prefill" else s.timing.decode_samples_ms
        times[LayerChoice(s.attention, s.ffn), s.num_layers] = np.asarray(samples)
    n = min(s.num_layers for s in result.stacks)
    fixed = 2 * times[NOTHING, n] - times[NOTHING, 2 * n]

    def layer(attention: str, ffn: str) -> Series:
        return (times[LayerChoice(attention, ffn), 2 * n] - fixed) / (2 * n)

    overhead, beside = layer(NOOP, NOOP), layer(NOOP, PARENT)
    series = {("attention", a): overhead + (layer(a, PARENT) - beside) for a in result.item.attention}
    series |= {("ffn", f): layer(NOOP, f) - overhead for f in result.item.ffn}
    return series | {(FIXED, FIXED): fixed - result.base_layers * layer(PARENT, PARENT)}


def _rows(result: Measurement, scenario: Scenario, estimated: bool) -> list[ProfileRow]:
    """A cost below zero is noise around one that is nearly nothing; it is set to 0, lest a search earns time by adding layers."""
    prefill, decode = (subblock_series(result, phase) for phase in ("prefill", "decode"))
    rows = []
    for size in result.sizes:
        key = (size.subblock, size.variant)
        rows.append(
            ProfileRow(
                "" if size.subblock == FIXED else result.item.layer_type,
                size.subblock,
                size.variant,
                result.item.batch_size,
                scenario.input_tokens,
                scenario.output_tokens,
                max(0.0, float(np.median(prefill[key]))),
                max(0.0, float(np.median(decode[key]))),
                spread(prefill[key]),
                spread(decode[key]),
                size.weight_bytes,
                size.kv_bytes_per_token,
                size.num_params,
                estimated,
            )
        )
    return rows


def _one_fixed(rows: Sequence[ProfileRow]) -> ProfileRow:
    """The layer types' own measurements of the same thing, averaged."""
    times = ("prefill_ms", "decode_ms", "prefill_spread_ms", "decode_spread_ms")
    return ProfileRow(**asdict(rows[0]) | {name: fmean(getattr(row, name) for row in rows) for name in times})


def profile_of(results: Iterable[Measurement], config: ProfileConfig) -> Profile:
    """The results, in any order, as one table. Raises ProfileError when they come from devices or versions of different kinds."""
    results = sorted(results, key=lambda r: r.item.name)
    sources = {(r.device, r.engine_version) for r in results}
    if len(sources) != 1:
        found = "; ".join(f"{version} on {device}" for device, version in sorted(sources))
        remedy = "pin one kind with profile.label_selector"
        raise ProfileError("profile", f"measurements of different kinds do not mix: {found}", remedy)
    estimated = is_estimate(find_engine(config.engine))
    rows = [row for result in results for row in _rows(result, config.scenario, estimated)]
    measured = [row for row in rows if row.subblock != FIXED]
    fixed = [
        _one_fixed([row for row in rows if row.subblock == FIXED and row.batch_size == batch_size])
        for batch_size in sorted({row.batch_size for row in rows})
    ]
    device, version = sources.pop()
    details = {"stack": config.stack, "repeats": _repeats(config), "num_gpus": config.num_gpus, **_about(results)}
    if config.memory_mib is not None:
        details |= {"memory_mib": config.memory_mib, "reserved_mib": config.reserved_mib}
    return Profile((*measured, *fixed), config.engine, version, device, config.dtype, estimated, details)


def _about(results: Sequence[Measurement]) -> dict[str, Any]:
    """The machines measured on, each item's with its clocks, and how far repeats of one stack lay apart, as a share of their median."""
    machines = {result.item.name.partition("/")[2].removesuffix(".json"): dict(result.machine) for result in results}
    shares: dict[str, list[float]] = {"prefill": [], "decode": []}
    for timing in (stack.timing for result in results for stack in result.stacks):
        for phase, found in shares.items():
            if ms := getattr(timing, f"{phase}_ms"):
                found.append(getattr(timing, f"{phase}_spread_ms") / ms)
    spreads = {phase: {"median": median(found), "max": max(found)} for phase, found in shares.items() if found}
    activations: dict[str, float] = {}
    for result in results:
        size = str(result.item.batch_size)
        activations[size] = max(activations.get(size, 0.0), result.activation_bytes / MIB)
    return {"machines": machines, "relative_spread": spreads, "activation_mib": activations}


def unfinished(items: Sequence[ProfileTask], artifact: Artifact) -> list[ProfileTask]:
    there = set(artifact.names("items"))
    return [item for item in items if item.name.removeprefix("items/") not in there]


def save_item(artifact: Artifact, result: Measurement) -> None:
    artifact.write(result.item.name, to_json(result))


def merge(items: Sequence[ProfileTask], config: ProfileConfig, artifact: Artifact) -> Profile:
    """All item files as one profile; closes the step."""
    profile = profile_of([Measurement.from_json(artifact.read(item.name)) for item in items], config)
    artifact.write(PROFILE_TABLE, profile.to_parquet())
    about = {name: getattr(profile, name) for name in ("device", "engine", "engine_version", "estimated")}
    artifact.finish({"items": len(items), "rows": len(profile.rows)} | about)
    return profile


def profile_serially(
    model_config: Any, space: SearchSpace, config: ProfileConfig, artifact: Artifact, progress: Progress
) -> Profile:
    """The profile stage in this process, without Ray."""
    items = profile_tasks(space, config)
    with progress.stage("profile", sum(runs_of(item, config) for item in items), "run") as bar:
        todo = unfinished(items, artifact)
        bar.advance(sum(runs_of(item, config) for item in items if item not in todo))
        for item in todo:
            save_item(artifact, measure(item, model_config, config, bar))
    return merge(items, config, artifact)
