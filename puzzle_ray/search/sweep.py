"""Searches many budgets, and marks the architectures that are on the Pareto frontier.

A grid has a list of values per axis. An axis is a limit's name (`speedup`, `memory_mib` ...) or part of the scenario: `batch_size`
(which must be profiled), `input_tokens` or `output_tokens`. A point of the grid has one value per axis. These values are the whole
budget, apart from `fixed` and `agree`.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from puzzle_ray.artifacts import Architecture, Choices, LayerChoice, Measure, Scenario, Scores
from puzzle_ray.errors import ConfigError, Infeasible, OutOfTime
from puzzle_ray.search.limits import SCENARIO_AXES, Limits
from puzzle_ray.search.setup import SearchSetup, solve_budget
from puzzle_ray.store import Artifact

if TYPE_CHECKING:
    from puzzle_ray.profiling.settings import ProfileConfig

SWEEP_POINTS = "sweep.json"
Point = Mapping[str, float]
Context = tuple[float, float]  # input and output tokens per request; means where the scenario's requests differ in length


def grid_points(sweep: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """Every combination of the axes' values. Values ascend, and the last axis varies fastest."""
    return [dict(zip(sweep, values, strict=True)) for values in product(*(sorted(set(x)) for x in sweep.values()))]


def grid_contexts(sweep: Mapping[str, Sequence[float]], scenario: Scenario) -> list[Context]:
    """The (input, output) tokens of a grid's points. An axis that the grid lacks has the scenario's own value.

    Raises ConfigError for a grid over lengths where the scenario has `lengths` or `kv_tokens`, since these hold for its own requests.
    """
    asked = [name for name in ("input_tokens", "output_tokens") if sweep.get(name)]
    for name in ("lengths", "kv_tokens"):
        if asked and getattr(scenario, name):
            problem = f"the scenario has {name}, which hold for its own requests only"
            raise ConfigError(f"search.sweep.{asked[0]}", problem, f"drop it, or profile.scenario.{name}")
    inputs = sweep.get("input_tokens") or (scenario.input_tokens,)
    outputs = sweep.get("output_tokens") or (scenario.output_tokens,)
    return [(_whole_if_exact(i), _whole_if_exact(o)) for i in inputs for o in outputs]


def _whole_if_exact(tokens: float) -> float:
    return int(tokens) if tokens == int(tokens) else tokens


def longest_context(sweep: Mapping[str, Sequence[float]], profile: ProfileConfig) -> int:
    """Tokens of the longest sequence of a grid and its scenario. Raises ConfigError for a batch size that is not profiled."""
    assert profile.batch_sizes != "auto", "batch sizes are still to be resolved"
    for size in sweep.get("batch_size", ()):
        if size not in (profile.scenario.batch_size, *profile.batch_sizes):
            raise ConfigError("search.sweep.batch_size", f"{size:g} is not profiled", "add it to profile.batch_sizes")
    asked = [sum(context) for context in grid_contexts(sweep, profile.scenario)]
    return int(max(profile.scenario.longest_tokens, *asked))


class Grid:
    """The setups behind a grid's points: one per context and batch size, each made when it is first needed."""

    def __init__(self, setups: Mapping[Context, SearchSetup]) -> None:
        self.setups = dict(setups)
        self._at: dict[tuple[Context, int], SearchSetup] = {}

    def setup(self, point: Point) -> SearchSetup:
        """The setup of a point. Raises ProfileError for a batch size, and ConfigError for a context, that was not profiled."""
        own = next(iter(self.setups))
        context = (point.get("input_tokens", own[0]), point.get("output_tokens", own[1]))
        if context not in self.setups:
            problem = f"{context[0]:g} tokens in and {context[1]:g} out were not profiled"
            raise ConfigError("search.sweep", problem, "profile them")
        if "batch_size" not in point:
            return self.setups[context]
        size = int(point["batch_size"])
        if (context, size) not in self._at:
            self._at[context, size] = self.setups[context].at_batch_size(size)
        return self._at[context, size]

    def limits(self, point: Point) -> Limits:
        """The whole budget of a point."""
        own = self.setup(point).limits
        budget = {name: value for name, value in point.items() if name not in SCENARIO_AXES}
        return Limits.model_validate({**budget, "fixed": own.fixed, "agree": own.agree})

    def solve(self, point: Point) -> dict[str, Any]:
        """Searches one point. The result is JSON-able: an architecture, or why there is none."""
        setup, limits = self.setup(point), self.limits(point)
        empty = dict.fromkeys(("architecture", "infeasible_reason", "measured_kl", "distilled", "unsolved_reason"))
        solved: dict[str, Any] = {"budget": dict(point)} | empty
        try:
            solved["architecture"] = asdict(solve_budget(setup, limits))
        except Infeasible as error:
            solved["infeasible_reason"] = str(error)
        except OutOfTime as error:
            solved["unsolved_reason"] = str(error)
        return solved

    def choices_at(self, points: Sequence[Point]) -> Iterator[Choices]:
        """The choices of every point that has an architecture."""
        for point in points:
            architecture = self.solve(point)["architecture"]
            if architecture is not None:
                yield tuple(LayerChoice(**choice) for choice in architecture["choices"])

    def with_scores(self, scores: Scores) -> Grid:
        """The same grid with other scores."""
        return Grid({context: replace(setup, scores=scores) for context, setup in self.setups.items()})


def point_name(point: Point) -> str:
    """The file of a solved point in a sweep's artifact."""
    return "points/" + ".".join(f"{name}-{value!r}" for name, value in point.items()) + ".json"


def unsolved_points(points: Sequence[Point], artifact: Artifact) -> list[Point]:
    """The points that have no file yet."""
    there = set(artifact.names("points"))
    return [point for point in points if point_name(point).removeprefix("points/") not in there]


@dataclass(frozen=True)
class SweepPoint:
    """A budget and its architecture, or why there is none: `infeasible_reason`, or `unsolved_reason` where time ran out.

    `measured_kl` is set where children on the frontier were measured. `distilled` is set where they went through GKD: `kl`,
    `heldout_loss` and more of the distilled child (see `puzzle_ray.evaluation.evaluate.predictions`). With `search.sweep_rungs`, `rungs`
    says what it was at every rung (see `puzzle_ray.distill.rungs.RungRow`), and `rivals` the same of others within this budget, in whose
    place `architecture` was taken; one that ended below the last rung has no `distilled`.
    """

    budget: Mapping[str, float]
    architecture: Architecture | None
    infeasible_reason: str | None
    on_frontier: bool
    measured_kl: float | None = None
    distilled: Mapping[str, float] | None = None
    unsolved_reason: str | None = None
    rungs: tuple[Mapping[str, Any], ...] = ()
    rivals: tuple[Mapping[str, Any], ...] = ()

    @property
    def why_none(self) -> str | None:
        """Why there is no architecture. None where there is one."""
        return self.infeasible_reason or self.unsolved_reason

    @property
    def speedup_asked(self) -> float | None:
        return self.budget.get("speedup")

    @property
    def label(self) -> str:
        """`1.5 x`, or `memory_mib 100, batch_size 8`."""
        words = (f"{value:g} x" if name == "speedup" else f"{name} {value:g}" for name, value in self.budget.items())
        return ", ".join(words)

    @property
    def stopped(self) -> bool:
        """Whether its distillation ended below the last rung."""
        return bool(self.rungs) and self.rungs[-1]["goes_on"] is False

    @property
    def scenario(self) -> tuple[float | None, ...]:
        """What of the budget is part of the scenario. Points of different ones are not compared."""
        return tuple(self.budget.get(name) for name in SCENARIO_AXES)


def _spent(name: str, point: SweepPoint) -> float:
    """What a point's architecture spends on one axis. Less is better, so speeds are negative."""
    assert point.architecture is not None
    costs = point.architecture.predicted
    by_word = {
        "speedup": -costs.throughput_tokens_per_s,
        "throughput": -costs.throughput_tokens_per_s,
        "latency": costs.runtime_ms,
        "prefill": costs.prefill_ms,
        "decode": costs.decode_ms,
        "memory": costs.memory_mib,
        "params": float(costs.num_params),
    }
    return by_word.get(name.partition("_")[0], point.budget[name])


def with_frontier(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """Marks the points on the Pareto frontier.

    A point is beaten by another one in the same scenario that has no more damage, spends no more of any swept budget, and is better
    in at least one of these. Of equal points, only the last is on the frontier.
    """
    axes = [name for name in (points[0].budget if points else ()) if name not in SCENARIO_AXES]
    compared = []
    for point in points:
        values = None
        if point.architecture is not None:
            values = (point.architecture.objective, *(_spent(name, point) for name in axes))
        compared.append((point.scenario, values))
    marked = []
    for i, (point, (scenario, own)) in enumerate(zip(points, compared, strict=True)):
        beaten = own is None or any(
            values is not None
            and scenario == other
            and all(a <= b for a, b in zip(values, own, strict=True))
            and (values != own or j > i)
            for j, (other, values) in enumerate(compared)
        )
        marked.append(replace(point, on_frontier=not beaten))
    return marked


def solved_points(points: Sequence[Point], artifact: Artifact) -> list[SweepPoint]:
    """All solved points in order, with the frontier marked."""
    return with_frontier([_point_from_json(artifact.read_json(point_name(point)) | {"on_frontier": False}) for point in points])


def with_measured(points: Sequence[SweepPoint], measure: Measure) -> list[SweepPoint]:
    """The points with the measured KL of every architecture on the frontier."""
    wanted = [point.architecture.choices for point in points if point.architecture and point.on_frontier]
    kl = dict(zip(wanted, (child.kl for child in measure(wanted)), strict=True))
    return [replace(p, measured_kl=kl[p.architecture.choices]) if p.architecture and p.on_frontier else p for p in points]


def frontier_choices(points: Sequence[SweepPoint]) -> dict[Choices, SweepPoint]:
    """Every distinct architecture on the frontier, with the first point that has it."""
    found: dict[Choices, SweepPoint] = {}
    for point in points:
        if point.architecture and point.on_frontier:
            found.setdefault(point.architecture.choices, point)
    return found


def with_distilled(points: Sequence[SweepPoint], distil: Callable[[Choices], Mapping[str, float] | None]) -> list[SweepPoint]:
    """The points with what `distil` returns for every architecture on the frontier. Each distinct one is distilled once."""
    distilled = {choices: distil(choices) for choices in frontier_choices(points)}
    return [replace(p, distilled=distilled[p.architecture.choices]) if p.architecture and p.on_frontier else p for p in points]


def finish_sweep(points: Sequence[SweepPoint], artifact: Artifact) -> None:
    """Writes the points as JSON, parquet and CSV, and finishes the artifact."""
    artifact.write_json(SWEEP_POINTS, [asdict(point) for point in points])
    rows = [table_row(point) for point in points]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    artifact.write("sweep.csv", text.getvalue().encode())
    artifact.write("sweep.parquet", _parquet_table(rows, names))
    facts = {
        "points": len(points),
        "infeasible": sum(point.infeasible_reason is not None for point in points),
        "unsolved": sum(point.unsolved_reason is not None for point in points),
        "on_frontier": sum(point.on_frontier for point in points),
    }
    artifact.finish(facts)


def table_row(point: SweepPoint) -> dict[str, Any]:
    """A point as a flat row of the CSV and parquet tables. A point without an architecture has empty numbers."""
    row: dict[str, Any] = {f"asked_{name}": float(value) for name, value in point.budget.items()}
    a = point.architecture
    row |= {
        "status": a.status if a else "infeasible" if point.infeasible_reason else "unsolved",
        "on_frontier": point.on_frontier,
        "objective": a.objective if a else None,
        "bound": a.bound if a else None,
        "measured_kl": point.measured_kl,
        "distilled_kl": point.distilled["kl"] if point.distilled else None,
        "distilled_heldout_loss": point.distilled["heldout_loss"] if point.distilled else None,
        "distilled_tokens": point.rungs[-1]["tokens"] if point.rungs else None,
        "rung_kl": point.rungs[-1]["kl"] if point.rungs else None,
        "stopped": point.stopped if point.rungs else None,
        "rivals": len(point.rivals) if point.rungs else None,
        "speedup": a.predicted_speedup if a else None,
        "estimated": a.estimated if a else None,
    }
    costs = asdict(a.predicted) if a else dict.fromkeys(("batch_size", "prefill_ms", "decode_ms", "runtime_ms"), None)
    row |= costs | {"solve_s": a.solve_s if a else None, "infeasible_reason": point.infeasible_reason}
    row |= {
        "unsolved_batch_sizes": " ".join(map(str, a.unsolved_batch_sizes)) if a else None,
        "unsolved_reason": point.unsolved_reason,
    }
    return row | {"choices": " | ".join(choice.label for choice in a.choices) if a else None}


def _parquet_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.table({name: [_finite(row.get(name)) for row in rows] for name in names}), sink)
    return sink.getvalue()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _point_from_json(raw: Mapping[str, Any]) -> SweepPoint:
    written = raw["architecture"]
    architecture = Architecture.from_json(json.dumps(written).encode()) if written is not None else None
    return SweepPoint(
        **{**raw, "architecture": architecture, "rungs": tuple(raw.get("rungs", ())), "rivals": tuple(raw.get("rivals", ()))}
    )


def read_sweep(artifact: Artifact) -> tuple[SweepPoint, ...]:
    """The points of a finished sweep."""
    return tuple(_point_from_json(raw) for raw in artifact.read_json(SWEEP_POINTS))
