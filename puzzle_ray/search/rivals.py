"""Rivals for the points of a sweep: several architectures within one budget, of which the one is taken that distils best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice

from puzzle_ray.artifacts import Architecture, Choices
from puzzle_ray.errors import Infeasible, OutOfTime
from puzzle_ray.search.limits import SCENARIO_AXES, SPEEDS
from puzzle_ray.search.measured import RungRows
from puzzle_ray.search.sweep import Grid, Point, SweepPoint


def asked(point: SweepPoint) -> tuple[float, ...]:
    """What a point allows of every swept budget, less being stricter. Speeds are negative."""
    return tuple(-value if name in SPEEDS else value for name, value in point.budget.items() if name not in SCENARIO_AXES)


def next_best(grid: Grid, budget: Point, count: int, min_different_layers: int) -> Iterator[Architecture]:
    """Up to `count` architectures within a budget, best first, each unlike all before it in so many layers."""
    setup, limits = grid.setup(budget), grid.limits(budget)
    with suppress(Infeasible, OutOfTime):  # there are no more, or none is found in time
        for answer in islice(setup.tables.answers(limits, setup.searcher, min_different_layers, setup.options), count):
            yield answer.architecture


def rivals(grid: Grid, point: SweepPoint, count: int, min_different_layers: int) -> list[Architecture]:
    """A point's architecture, and so many next best ones that they are `count`."""
    assert point.architecture is not None
    found = [point.architecture]
    if count > 1:
        more = next_best(grid, point.budget, count, min_different_layers)
        found += [architecture for architecture in more if architecture.choices != point.architecture.choices]
    return found[:count]


def all_choices(grid: Grid, points: Sequence[Point], count: int, min_different_layers: int) -> Iterator[Choices]:
    """The choices of all answers to every point, rivals included."""
    yield from grid.choices_at(points)
    if count > 1:
        for point in points:
            yield from (architecture.choices for architecture in next_best(grid, point, count, min_different_layers))


def with_best(point: SweepPoint, found: Sequence[Architecture], rows: Mapping[Choices, RungRows]) -> SweepPoint:
    """The point with the rival that came furthest and, of equals there, has the least KL; the others stand beside it."""

    def place(architecture: Architecture) -> tuple[int, float]:
        last = rows[architecture.choices][-1]
        return -last["rung"], last["kl"]

    first, best = found[0], min(found, key=place)
    if best is not first:
        bound, words = min(first.bound, best.objective), f"{first.searcher}, distilled"
        best = replace(best, searcher=words, bound=bound, status="measured")
    others = tuple(
        {
            "choices": " | ".join(choice.label for choice in rival.choices),
            "objective": rival.objective,
            "rungs": list(rows[rival.choices]),
        }
        for rival in found
        if rival.choices != best.choices
    )
    return replace(point, architecture=best, rungs=tuple(rows[best.choices]), rivals=others)
