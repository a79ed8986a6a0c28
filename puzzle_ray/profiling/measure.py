"""What every subblock shape costs, from stacks of identical layers in real models of the family.

A model of k layers (a, f), with attention a and FFN f, takes T(k) = fixed + k c(a, f). `fixed` is the same for all layers: embedding,
head, and what a step costs besides its layers. Two stacks of no-ops, n and 2n layers deep, give it: fixed = 2 T(n) - T(2n).
Every other stack is 2n layers deep, and c = (T(2n) - fixed) / 2n. The difference (T(2n) - T(n)) / n would need a second stack, and has
twice the error on a noisy CPU, as a small difference of large times.

An FFN f costs c(noop, f) - c(noop, noop). An attention a costs c(a, parent) - c(noop, parent) + c(noop, noop).
So the parent's two halves add up to c(parent, parent), which was measured as a whole. The no-op FFN is free, and the no-op attention
has the overhead of a layer. Attention is measured with an FFN in its layer, because in any model it shares the CPU's caches with one.
Alone it would look cheaper.

Where requests differ in length (`Scenario.lengths`), every run has one request of each kind, and a sample is their weighted mean.

All stacks of a task are timed in turn, round after round, each round in another order. Costs are computed within a round, where the
machine is the same for all stacks. Then the median over rounds is kept.
An engine may put layers of the parent's own into every stack. Then `fixed` contains their cost, and it is subtracted.
This module says what is independent (tasks, measuring, merging). It does not say where it runs.
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
)
from puzzle_ray.errors import ProfileError
from puzzle_ray.models.child import original_config
from puzzle_ray.models.describe import describe
from puzzle_ray.profiling.engine import Series, Target, Timing, engine_of, find_engine, is_estimate, measure_side_by_side, spread
from puzzle_ray.profiling.memory import Weights, fixed_weights, kept_tokens, peak_bytes, subblock_weights
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.progress import Bar, Progress
from puzzle_ray.store import Artifact

PROFILE_TABLE = "profile.parquet"
NOOP = "noop"
NOOP_LAYER = LayerChoice(NOOP, NOOP)


@dataclass(frozen=True)
class ProfileTask:
    """All shapes of one layer type at one batch size. They are timed in turn, so that their times can be compared."""

    layer_type: str
    batch_size: int
    attention: tuple[str, ...]
    ffn: tuple[str, ...]

    @property
    def name(self) -> str:
        """The file of its measurement in a profile's artifact."""
        return f"items/{self.layer_type}.batch_{self.batch_size}.json"

    def stacks(self, n: int) -> tuple[tuple[LayerChoice, int], ...]:
        """The stacks to time, each as (layer, number of layers).

        No-ops n and 2n layers deep, then every FFN beside a no-op attention, and every attention beside the parent's FFN.
        """
        pairs = [LayerChoice(NOOP, f) for f in self.ffn] + [LayerChoice(a, PARENT) for a in self.attention]
        return ((NOOP_LAYER, n), *((choice, 2 * n) for choice in dict.fromkeys([NOOP_LAYER, *pairs])))


def profile_tasks(space: SearchSpace, config: ProfileConfig) -> list[ProfileTask]:
    """One task per layer type and batch size. Every distinct shape is in one of them."""
    assert config.batch_sizes != "auto", "batch sizes are still to be resolved"
    tasks = []
    for batch_size in sorted({config.scenario.batch_size, *config.batch_sizes}):
        for layer_type in dict.fromkeys(layer.layer_type for layer in space.layers):
            layers = [layer for layer in space.layers if layer.layer_type == layer_type]
            a, f = (tuple(dict.fromkeys(v for x in layers for v in (*x.variants(kind), x.now.variant(kind)))) for kind in KINDS)
            tasks.append(ProfileTask(layer_type, batch_size, a, f))
    return tasks


def check_shapes(space: SearchSpace, model_config: Any, config: ProfileConfig) -> None:
    """Raises ConfigError or ParentError for a parent or a variant that the engine cannot run."""
    check = getattr(find_engine(config.engine), "check", None)
    if check is not None:
        for task in profile_tasks(space, config):
            check(task, model_config)


def num_runs(task: ProfileTask, config: ProfileConfig) -> int:
    """How many times `measure_task` runs a model, warm-ups included."""
    return len(task.stacks(config.stack)) * (_repeats(config) + 1)


def _repeats(config: ProfileConfig) -> int:
    return 1 if is_estimate(find_engine(config.engine)) else config.repeats


@dataclass(frozen=True)
class StackTiming:
    """The times of a model of `num_layers` layers (attention, ffn)."""

    attention: str
    ffn: str
    num_layers: int
    timing: Timing


@dataclass(frozen=True)
class SubblockSize:
    """The size of one subblock. Subblock `fixed` is all that is in no subblock."""

    subblock: str
    variant: str
    weight_bytes: int
    num_params: int
    kv_bytes_per_token: int


@dataclass(frozen=True)
class Measurement:
    """All that was measured for a task, before anything is computed from it."""

    task: ProfileTask
    stacks: tuple[StackTiming, ...]
    sizes: tuple[SubblockSize, ...]
    engine_version: str
    device: str
    machine: Mapping[str, Any] = field(default_factory=dict)
    base_layers: int = 0  # layers of the parent's own in every stack besides
    activation_bytes: int = 0  # of the parent's prefill, see the function `activation_bytes`

    def to_json(self) -> bytes:
        """In files, the task is called `item`."""
        values = asdict(self)
        return json.dumps({"item": values.pop("task"), **values}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Measurement:
        """What `to_json` wrote."""
        raw = json.loads(data)
        task = raw["item"]
        task |= {"attention": tuple(task["attention"]), "ffn": tuple(task["ffn"])}
        stacks = [s | {"timing": Timing(*(tuple(v) for v in s["timing"].values()))} for s in raw["stacks"]]
        return cls(
            ProfileTask(**task),
            tuple(StackTiming(**s) for s in stacks),
            tuple(SubblockSize(**s) for s in raw["sizes"]),
            raw["engine_version"],
            raw["device"],
            raw["machine"],
            raw["base_layers"],
            raw["activation_bytes"],
        )


def stack_config(model_config: Any, layer_type: str, num_layers: int) -> Any:
    """The family's config with `num_layers` layers of one type. All layers are the original's where the parent is a child itself."""
    config = copy.deepcopy(original_config(model_config))
    own = config.num_hidden_layers
    for name, values in config.to_dict().items():  # settings with an entry per layer: a stack may be deeper than the parent
        if isinstance(values, list) and len(values) == own:
            setattr(config, name, [values[index % own] for index in range(num_layers)])
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [layer_type] * num_layers
    if getattr(config, "attention_layers", None) is not None:  # GPT-Neo's name of `layer_types`
        config.attention_types, config.attention_layers = [[[layer_type], num_layers]], [layer_type] * num_layers
    return config


def measure_task(task: ProfileTask, model_config: Any, config: ProfileConfig, bar: Bar | None = None) -> Measurement:
    """Builds the task's stacks and times them. Raises ProfileError where the device is missing or too small."""
    engine, use_gpu, activations = engine_of(config), config.num_gpus > 0, activation_bytes(task, model_config, config)
    scenario = replace(config.scenario, batch_size=task.batch_size)
    _check_length(model_config, scenario)
    time_stacks = getattr(engine, "time_stacks", None)
    if time_stacks is not None:
        timed, sizes = time_stacks(task, model_config, config, bar), subblock_sizes(task, model_config, config)
        about = (engine.version(), engine.device_name(use_gpu), engine.facts(use_gpu))
        return Measurement(task, tuple(timed), sizes, *about, 1, activations)
    stacks: dict[tuple[LayerChoice, int], Any] = {}
    try:
        for choice, depth in task.stacks(config.stack):
            like = next(iter(stacks.values()), None)
            shape = stack_config(model_config, task.layer_type, depth)
            stacks[choice, depth] = engine.build(shape, [choice] * depth, config.dtype, use_gpu, like)
        sizes = _sizes_in_models(task, model_config, {choice: model for (choice, _), model in stacks.items()}, config)
        named = {f"{choice.label} x {depth}": model for (choice, depth), model in stacks.items()}
        timings = measure_side_by_side(named, scenario, _repeats(config), engine, bar)
    except torch.OutOfMemoryError as error:
        raise ProfileError(
            "profile",
            f"{len(stacks)} models at batch size {task.batch_size} do not fit the GPU ({error})",
            "lower profile.stack or the batch size",
        ) from None
    timed = [StackTiming(c.attention, c.ffn, d, timings[f"{c.label} x {d}"]) for c, d in stacks]
    about = (engine.version(), engine.device_name(use_gpu), engine.facts(use_gpu))
    return Measurement(task, tuple(timed), sizes, *about, getattr(engine, "base_layers", 0), activations)


def _check_length(model_config: Any, scenario: Scenario) -> None:
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions is not None and scenario.longest_tokens > positions:
        raise ProfileError(
            "profile.scenario",
            f"{scenario.longest_tokens} tokens in and out do not fit the parent's {positions} positions",
            "lower input_tokens or output_tokens",
        )


def subblock_sizes(task: ProfileTask, model_config: Any, config: ProfileConfig) -> tuple[SubblockSize, ...]:
    """The sizes of a task's shapes, from models on the `meta` device, whose parameters and caches are only shapes."""
    from puzzle_ray.models.child import new_child

    dtype = torch.bfloat16 if config.dtype == "fp8" else getattr(torch, config.dtype)
    shape = stack_config(model_config, task.layer_type, 1)
    with torch.device("meta"):
        stacks = {choice: new_child(shape, [choice], dtype).eval() for choice, _ in task.stacks(1)}
    return _sizes_in_models(task, model_config, stacks, config)


def activation_bytes(task: ProfileTask, model_config: Any, config: ProfileConfig) -> int:
    """The most bytes that the longest prefill of the parent's own layers holds besides weights and KV cache. Children need no more."""
    from puzzle_ray.models.child import new_child

    dtype = "bfloat16" if config.dtype == "fp8" else config.dtype
    prompt = max(int(shape.input_tokens) for shape, _ in config.scenario.shapes)
    shape, layers = stack_config(model_config, task.layer_type, 2), [LayerChoice()] * 2  # deeper models hold no more
    return peak_bytes(lambda: new_child(shape, layers, getattr(torch, dtype)).eval(), task.batch_size, prompt)


def _sizes_in_models(
    task: ProfileTask, model_config: Any, stacks: Mapping[LayerChoice, Any], config: ProfileConfig
) -> tuple[SubblockSize, ...]:
    """The sizes of a task's shapes in `stacks`. For fp8, models are built in 16 bits and sizes are halved, except embedding and head."""
    descriptor, tokens = describe(model_config), config.scenario.kv_tokens_per_sequence
    narrower = 2 if config.dtype == "fp8" else 1

    def size(kind: SubblockKind, variant: str, choice: LayerChoice) -> SubblockSize:
        model = stacks[choice]
        weights = subblock_weights(model.get_submodule(descriptor.layers)[0], kind, descriptor)
        kv_bytes = kept_tokens(model)[0].in_dtype(config.dtype).bytes_per_token(tokens) if kind == "attention" else 0
        return SubblockSize(kind, variant, weights.weight_bytes // narrower, weights.num_params, kv_bytes)

    fixed: Weights = fixed_weights(next(iter(stacks.values())), descriptor)
    return (
        *(size("attention", a, LayerChoice(a, PARENT)) for a in task.attention),
        *(size("ffn", f, LayerChoice(NOOP, f)) for f in task.ffn),
        SubblockSize(FIXED, FIXED, fixed.weight_bytes, fixed.num_params, 0),
    )


def subblock_series(result: Measurement, phase: str) -> dict[tuple[str, str], Series]:
    """(subblock, variant) -> its cost in ms in every round, (`fixed`, `fixed`) included. `phase`: `prefill` or `decode`."""
    times: dict[tuple[LayerChoice, int], Series] = {}
    for s in result.stacks:
        samples = s.timing.prefill_samples_ms if phase == "prefill" else s.timing.decode_samples_ms
        times[LayerChoice(s.attention, s.ffn), s.num_layers] = np.asarray(samples)
    n = min(s.num_layers for s in result.stacks)
    fixed = 2 * times[NOOP_LAYER, n] - times[NOOP_LAYER, 2 * n]

    def layer(attention: str, ffn: str) -> Series:
        return (times[LayerChoice(attention, ffn), 2 * n] - fixed) / (2 * n)

    overhead, beside = layer(NOOP, NOOP), layer(NOOP, PARENT)
    series = {("attention", a): overhead + (layer(a, PARENT) - beside) for a in result.task.attention}
    series |= {("ffn", f): layer(NOOP, f) - overhead for f in result.task.ffn}
    return series | {(FIXED, FIXED): fixed - result.base_layers * layer(PARENT, PARENT)}


def _profile_rows(result: Measurement, scenario: Scenario, estimated: bool) -> list[ProfileRow]:
    """A measurement as rows. A cost below zero is noise around a cost near zero. It is set to 0, so that no layer can save time."""
    prefill, decode = (subblock_series(result, phase) for phase in ("prefill", "decode"))
    rows = []
    for size in result.sizes:
        key = (size.subblock, size.variant)
        rows.append(
            ProfileRow(
                "" if size.subblock == FIXED else result.task.layer_type,
                size.subblock,
                size.variant,
                result.task.batch_size,
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


def _one_fixed(rows: Sequence[ProfileRow], request_ms: float) -> ProfileRow:
    """The mean of the measurements of `fixed`, which every layer type has, and what a batch's requests cost besides."""
    times = ("prefill_ms", "decode_ms", "prefill_spread_ms", "decode_spread_ms")
    means = {name: fmean(getattr(row, name) for row in rows) for name in times}
    means["prefill_ms"] += rows[0].batch_size * request_ms
    return ProfileRow(**asdict(rows[0]) | means)


def profile_of(results: Iterable[Measurement], config: ProfileConfig) -> Profile:
    """Measurements, in any order, as one profile. Raises ProfileError when they are from different kinds of devices or versions."""
    results = sorted(results, key=lambda r: r.task.name)
    sources = {(r.device, r.engine_version) for r in results}
    if len(sources) != 1:
        kinds = "; ".join(f"{version} on {device}" for device, version in sorted(sources))
        remedy = "pin one kind with profile.label_selector"
        raise ProfileError("profile", f"measurements of different kinds do not mix: {kinds}", remedy)
    estimated = is_estimate(find_engine(config.engine))
    rows = [row for result in results for row in _profile_rows(result, config.scenario, estimated)]
    measured = [row for row in rows if row.subblock != FIXED]
    fixed = [
        _one_fixed([row for row in rows if row.subblock == FIXED and row.batch_size == batch_size], config.request_ms)
        for batch_size in sorted({row.batch_size for row in rows})
    ]
    device, version = sources.pop()
    details = {"stack": config.stack, "repeats": _repeats(config), "num_gpus": config.num_gpus, **_details(results)}
    return Profile((*measured, *fixed), config.engine, version, device, config.dtype, estimated, details)


def _details(results: Sequence[Measurement]) -> dict[str, Any]:
    """The machine of every task, the spread of repeats of one stack as a share of their median, and activations by batch size."""
    machines = {result.task.name.partition("/")[2].removesuffix(".json"): dict(result.machine) for result in results}
    shares: dict[str, list[float]] = {"prefill": [], "decode": []}
    for timing in (stack.timing for result in results for stack in result.stacks):
        for phase, relative in shares.items():
            if ms := getattr(timing, f"{phase}_ms"):
                relative.append(getattr(timing, f"{phase}_spread_ms") / ms)
    spreads = {phase: {"median": median(all_), "max": max(all_)} for phase, all_ in shares.items() if all_}
    activations: dict[str, float] = {}
    for result in results:
        size = str(result.task.batch_size)
        activations[size] = max(activations.get(size, 0.0), result.activation_bytes / MIB)
    return {"machines": machines, "relative_spread": spreads, "activation_mib": activations}


def unfinished_tasks(tasks: Sequence[ProfileTask], artifact: Artifact) -> list[ProfileTask]:
    """The tasks that have no measurement in the artifact yet."""
    there = set(artifact.names("items"))
    return [task for task in tasks if task.name.removeprefix("items/") not in there]


def save_measurement(artifact: Artifact, result: Measurement, target: Target | None = None) -> None:
    """Writes the file of one task. Raises ProfileError for a measurement of anything but `target`, where one is given."""
    measured = Target(result.device, result.engine_version)
    if target is not None and measured != target:
        problem = f"the profile is of {target}, and {result.task.name} was measured by {measured}"
        remedy = (
            "where nodes have changed, run the same command again; where they differ, pin one kind with profile.label_selector"
        )
        raise ProfileError("profile", problem, remedy)
    artifact.write(result.task.name, result.to_json())


def merge_profile(tasks: Sequence[ProfileTask], config: ProfileConfig, artifact: Artifact) -> Profile:
    """All measurements as one profile. Finishes the artifact."""
    profile = profile_of([Measurement.from_json(artifact.read(task.name)) for task in tasks], config)
    artifact.write(PROFILE_TABLE, profile.to_parquet())
    about = {name: getattr(profile, name) for name in ("device", "engine", "engine_version", "estimated")}
    artifact.finish({"items": len(tasks), "rows": len(profile.rows)} | about)
    return profile


def profile_serially(
    model_config: Any,
    space: SearchSpace,
    config: ProfileConfig,
    artifact: Artifact,
    progress: Progress,
    target: Target | None = None,
) -> Profile:
    """The whole profile in this process, without Ray. Raises ProfileError where it is of anything but `target`, where one is given."""
    tasks = profile_tasks(space, config)
    with progress.stage("profile", sum(num_runs(task, config) for task in tasks), "run") as bar:
        todo = unfinished_tasks(tasks, artifact)
        bar.advance(sum(num_runs(task, config) for task in tasks if task not in todo))
        for task in todo:
            save_measurement(artifact, measure_task(task, model_config, config, bar), target)
    return merge_profile(tasks, config, artifact)
