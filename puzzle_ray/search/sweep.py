"""One budget, many budgets: from scores and profiles to architectures, and which of them are on the Pareto frontier.

A grid is a list of values per axis. An axis is a limit's name (`speedup`, `memory_mib` ...), or of the scenario: `batch_size`
(must be profiled), `input_tokens`, `output_tokens`. A point is one value per axis, and its whole budget but for what is fixed.
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
from puzzle_ray.errors import ConfigError, Infeasible
from puzzle_ray.search.limits import SCENARIO_AXES, Limits
from puzzle_ray.search.setup import SearchSetup, solve
from puzzle_ray.store import Artifact

if TYPE_CHECKING:
    from puzzle_ray.profiling.settings import ProfileConfig

SWEEP_POINTS = "sweep.json"
Point = Mapping[str, float]
Context = tuple[float, float]  # input and output tokens; means where the scenario's requests differ


def points_of(sweep: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """Every combination of the axes' values, the last axis running fastest, values ascending."""
    return [dict(zip(sweep, values, strict=True)) for values in product(*(sorted(set(x)) for x in sweep.values()))]


def contexts_of(sweep: Mapping[str, Sequence[float]], scenario: Scenario) -> list[Context]:
    """The (input, output) tokens that a grid asks for; the scenario's own where it does not say.

    Raises ConfigError for a grid of lengths over a scenario whose requests differ in theirs, or are given a KV cache of their own.
    """
    asked = [name for name in ("input_tokens", "output_tokens") if sweep.get(name)]
    for name in ("lengths", "kv_tokens"):
        if asked and getattr(scenario, name):
            problem = f"the scenario has {name}, which hold for its own requests only"
            raise ConfigError(f"search.sweep.{asked[0]}", problem, f"drop it, or profile.scenario.{name}")
    inputs = sweep.get("input_tokens") or (scenario.input_tokens,)
    outputs = sweep.get("output_tokens") or (scenario.output_tokens,)
    return [(_counted(i), _counted(o)) for i in inputs for o in outputs]


def _counted(tokens: float) -> float:
    return int(tokens) if tokens == int(tokens) else tokens


def longest_context(sweep: Mapping[str, Sequence[float]], profile: ProfileConfig) -> int:
    """Tokens of the longest sequence that a grid or the scenario has. Raises ConfigError for a batch size that is not profiled."""
    assert profile.batch_sizes != "auto", "batch sizes are still to be resolved"
    for size in sweep.get("batch_size", ()):
        if size not in (profile.scenario.batch_size, *profile.batch_sizes):
            raise ConfigError("search.sweep.batch_size", f"{size:g} is not profiled", "add it to profile.batch_sizes")
    asked = [sum(context) for context in contexts_of(sweep, profile.scenario)]
    return int(max(profile.scenario.longest_tokens, *asked))


class Grid:
    """The setups behind a grid's points, one per context and batch size, each made when it is first needed."""

    def __init__(self, setups: Mapping[Context, SearchSetup]) -> None:
        self.setups = dict(setups)
        self._at: dict[tuple[Context, int], SearchSetup] = {}

    def setup(self, point: Point) -> SearchSetup:
        """Raises ProfileError for a batch size, ConfigError for a context that was not profiled."""
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

    def solve(self, point: Point) -> dict[str, Any]:
        """One point of a sweep, JSON-able: an architecture, or why there is none."""
        setup = self.setup(point)
        budget = {name: value for name, value in point.items() if name not in SCENARIO_AXES}
        limits = Limits.model_validate({**budget, "fixed": setup.limits.fixed, "agree": setup.limits.agree})
        nothing = dict.fromkeys(("architecture", "infeasible_reason", "measured_kl", "distilled"))
        found: dict[str, Any] = {"budget": dict(point)} | nothing
        try:
            found["architecture"] = asdict(solve(setup, limits))
        except Infeasible as error:
            found["infeasible_reason"] = str(error)
        return found

    def answers(self, points: Sequence[Point]) -> Iterator[Choices]:
        """The architectures at those points that have one."""
        for point in points:
            found = self.solve(point)["architecture"]
            if found is not None:
                yield tuple(LayerChoice(**choice) for choice in found["choices"])

    def with_scores(self, scores: Scores) -> Grid:
        """The same questions, asked of other scores."""
        return Grid({context: replace(setup, scores=scores) for context, setup in self.setups.items()})


def point_name(point: Point) -> str:
    return "points/" + ".".join(f"{name}-{value!r}" for name, value in point.items()) + ".json"


def unsolved(points: Sequence[Point], artifact: Artifact) -> list[Point]:
    there = set(artifact.names("points"))
    return [point for point in points if point_name(point).removeprefix("points/") not in there]


@dataclass(frozen=True)
class SweepPoint:
    """A budget that was asked for and what came of it. `measured_kl` where the frontier was measured; `distilled` where it went through
    GKD: `kl`, `heldout_loss` and more of the distilled child (see `puzzle_ray.evaluation.evaluate.predictions`)."""

    budget: Mapping[str, float]
    architecture: Architecture | None
    infeasible_reason: str | None
    on_frontier: bool
    measured_kl: float | None = None
    distilled: Mapping[str, float] | None = None

    @property
    def speedup_asked(self) -> float | None:
        return self.budget.get("speedup")

    @property
    def label(self) -> str:
        """`1.5 x`, or `memory_mib 100, batch_size 8`."""
        words = (f"{value:g} x" if name == "speedup" else f"{name} {value:g}" for name, value in self.budget.items())
        return ", ".join(words)


def _spent(name: str, point: SweepPoint) -> float:
    """What an answer spends of the budget of an axis, less being better."""
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
    """Marks the answers that no other one beats: none in the same scenario has no more damage, spends no more of any swept
    budget, and is better in one of them. Of equal ones the last counts."""
    axes = [name for name in (points[0].budget if points else ()) if name not in SCENARIO_AXES]
    found = []
    for point in points:
        scenario = tuple(point.budget.get(name) for name in SCENARIO_AXES)
        values = None
        if point.architecture is not None:
            values = (point.architecture.objective, *(_spent(name, point) for name in axes))
        found.append((scenario, values))
    marked = []
    for i, (point, (scenario, own)) in enumerate(zip(points, found, strict=True)):
        beaten = own is None or any(
            values is not None
            and scenario == other
            and all(a <= b for a, b in zip(values, own, strict=True))
            and (values != own or j > i)
            for j, (other, values) in enumerate(found)
        )
        marked.append(replace(point, on_frontier=not beaten))
    return marked


def gathered(points: Sequence[Point], artifact: Artifact) -> list[SweepPoint]:
    """All solved points in order, the frontier marked."""
    return with_frontier([_point(artifact.read_json(point_name(point)) | {"on_frontier": False}) for point in points])


def with_measured(points: Sequence[SweepPoint], measure: Measure) -> list[SweepPoint]:
    """The true KL of every answer on the frontier."""
    wanted = [point.architecture.choices for point in points if point.architecture and point.on_frontier]
    kl = dict(zip(wanted, (found.kl for found in measure(wanted)), strict=True))
    return [replace(p, measured_kl=kl[p.architecture.choices]) if p.architecture and p.on_frontier else p for p in points]


def with_distilled(points: Sequence[SweepPoint], distil: Callable[[Choices], Mapping[str, float]]) -> list[SweepPoint]:
    """What `distil` finds for every answer on the frontier, asked once for those that share an architecture."""
    wanted = [point.architecture.choices for point in points if point.architecture and point.on_frontier]
    found = {choices: distil(choices) for choices in dict.fromkeys(wanted)}
    return [replace(p, distilled=found[p.architecture.choices]) if p.architecture and p.on_frontier else p for p in points]


def finish(points: Sequence[SweepPoint], artifact: Artifact) -> None:
    """Writes the points as JSON, parquet and CSV, and closes the step."""
    artifact.write_json(SWEEP_POINTS, [asdict(point) for point in points])
    rows = [row_of(point) for point in points]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    artifact.write("sweep.csv", text.getvalue().encode())
    artifact.write("sweep.parquet", _parquet(rows, names))
    infeasible = sum(point.architecture is None for point in points)
    artifact.finish({"points": len(points), "infeasible": infeasible, "on_frontier": sum(point.on_frontier for point in points)})


def row_of(point: SweepPoint) -> dict[str, Any]:
    """A point as a flat row of the tables; numbers of points without an answer are empty."""
    row: dict[str, Any] = {f"asked_{name}": float(value) for name, value in point.budget.items()}
    a = point.architecture
    row |= {
        "status": a.status if a else "infeasible",
        "on_frontier": point.on_frontier,
        "objective": a.objective if a else None,
        "bound": a.bound if a else None,
        "measured_kl": point.measured_kl,
        "distilled_kl": point.distilled["kl"] if point.distilled else None,
        "distilled_heldout_loss": point.distilled["heldout_loss"] if point.distilled else None,
        "speedup": a.predicted_speedup if a else None,
        "estimated": a.estimated if a else None,
    }
    costs = asdict(a.predicted) if a else dict.fromkeys(("batch_size", "prefill_ms", "decode_ms", "runtime_ms"), None)
    row |= costs | {"solve_s": a.solve_s if a else None, "infeasible_reason": point.infeasible_reason}
    return row | {"choices": " | ".join(choice.label for choice in a.choices) if a else None}


def _parquet(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.table({name: [_finite(row.get(name)) for row in rows] for name in names}), sink)
    return sink.getvalue()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _point(raw: Mapping[str, Any]) -> SweepPoint:
    found = raw["architecture"]
    architecture = Architecture.from_json(json.dumps(found).encode()) if found is not None else None
    return SweepPoint(
        raw["budget"], architecture, raw["infeasible_reason"], raw["on_frontier"], raw["measured_kl"], raw["distilled"]
    )


def read(artifact: Artifact) -> tuple[SweepPoint, ...]:
    """The points of a finished sweep."""
    return tuple(_point(raw) for raw in artifact.read_json(SWEEP_POINTS))
