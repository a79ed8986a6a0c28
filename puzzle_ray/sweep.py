"""One budget, many budgets: from scores and a profile to architectures, and which of them are on the frontier."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from puzzle_ray.artifacts import Architecture, Profile, Scenario, Scores, SearchSpace
from puzzle_ray.errors import Infeasible
from puzzle_ray.search.architectures import search
from puzzle_ray.search.limits import Limits
from puzzle_ray.store import Step

TABLE = "sweep.json"


@dataclass(frozen=True)
class SweepSetup:
    """All a search reads besides its limits."""

    space: SearchSpace
    scores: Scores
    profile: Profile
    scenario: Scenario
    metric: str
    searcher: str
    time_limit_s: float


def solve(setup: SweepSetup, limits: Limits) -> Architecture:
    """The best architecture within the limits. Raises Infeasible."""
    found = search(
        setup.space,
        setup.scores,
        setup.profile,
        setup.scenario,
        limits,
        metric=setup.metric,
        searcher=setup.searcher,
        time_limit_s=setup.time_limit_s,
    )
    return found[0]


def point_name(speedup: float) -> str:
    return f"points/speedup-{speedup:g}.json"


def solve_point(setup: SweepSetup, speedup: float) -> dict[str, Any]:
    """One point of a sweep, JSON-able: an architecture, or why there is none."""
    point: dict[str, Any] = {"speedup_asked": speedup, "architecture": None, "infeasible_reason": None}
    try:
        point["architecture"] = asdict(solve(setup, Limits(speedup=speedup)))
    except Infeasible as error:
        point["infeasible_reason"] = str(error)
    return point


@dataclass(frozen=True)
class SweepPoint:
    """A budget that was asked for and what came of it."""

    speedup_asked: float
    architecture: Architecture | None
    infeasible_reason: str | None
    on_frontier: bool


def finish(speedups: Sequence[float], step: Step) -> tuple[SweepPoint, ...]:
    """Gathers the points in order, marks the Pareto frontier (faster, or less damage), and closes the step."""
    points = [step.read_json(point_name(speedup)) for speedup in sorted(speedups)]
    best = float("inf")
    for point in reversed(points):
        found = point["architecture"]
        point["on_frontier"] = found is not None and found["objective"] < best
        best = min(best, found["objective"]) if found is not None else best
    step.write_json(TABLE, points)
    step.finish({"points": len(points), "infeasible": sum(p["architecture"] is None for p in points)})
    return read(step)


def read(step: Step) -> tuple[SweepPoint, ...]:
    """The points of a finished sweep."""
    out = []
    for point in step.read_json(TABLE):
        found = point["architecture"]
        architecture = Architecture.from_json(json.dumps(found).encode()) if found is not None else None
        out.append(SweepPoint(point["speedup_asked"], architecture, point["infeasible_reason"], point["on_frontier"]))
    return tuple(out)
