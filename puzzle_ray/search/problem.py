"""The search as numbers: every row has choices, every choice has a score and costs, and limits bound the sums of costs.

A row is a layer, or a group of layers that must agree.
Shapes: C costs, R rows, V choices. V is the number of choices of the longest row. A shorter row is filled up with score +inf and cost 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from puzzle_ray.errors import Infeasible

Floats = NDArray[np.float64]
Choice = NDArray[np.intp]  # [R]: the index of every row's choice
TOLERANCE = 1e-12  # of a cost's whole range: above the rounding of a sum, below any real difference


@dataclass(frozen=True)
class Limit:
    """`sum of one cost <= bound`, and what the user wrote for it.

    `cost` is an index into the problem's costs. `asked` is the value that the user wrote, in the user's quantity:
    - cost / `of` for a plain limit or a fraction,
    - `over` / cost for a speed,
    - (`minus` - cost) / `of` for a minimum.
    """

    name: str
    cost: int
    bound: float
    asked: float
    unit: str = ""
    of: float = 1.0
    over: float | None = None
    minus: float | None = None

    @property
    def sense(self) -> str:
        return "<=" if self.over is None and self.minus is None else ">="

    def reached(self, cost: float) -> float:
        """The quantity that the user limited, at this cost."""
        if self.over is not None:
            return self.over / cost if cost > 0 else math.inf
        return (cost if self.minus is None else self.minus - cost) / self.of

    def __str__(self) -> str:
        return f"{self.name} {self.sense} {self.asked:g}{' ' + self.unit if self.unit else ''}"


@dataclass(frozen=True, eq=False)
class Problem:
    """Minimise the sum of scores within the limits.

    `score` is [R, V] and `costs` is [C, R, V]. `constants` [C] is what every architecture pays.
    `weights` [R] counts the layers that a row stands for. `labels` names every row's choices.
    """

    score: Floats
    costs: Floats
    cost_names: tuple[str, ...]
    constants: Floats
    weights: NDArray[np.intp]
    labels: tuple[tuple[str, ...], ...]
    limits: tuple[Limit, ...] = ()
    _scale: Floats = field(init=False, repr=False)

    def __post_init__(self) -> None:
        whole = np.abs(self.costs).max(axis=2).sum(axis=1) + np.abs(self.constants)
        object.__setattr__(self, "_scale", np.where(whole > 0, whole, 1.0))

    def objective(self, choice: Choice) -> float:
        """The exact sum of scores, rounded once."""
        return math.fsum(self.score[np.arange(len(choice)), choice])

    def spent(self, choice: Choice) -> list[float]:
        """The exact sum of every cost, rounded once. [C]"""
        picked = self.costs[:, np.arange(len(choice)), choice]
        return [math.fsum([*row, constant]) for row, constant in zip(picked, self.constants, strict=True)]

    def violated(self, choice: Choice) -> list[Limit]:
        """The limits that a choice does not meet."""
        spent = self.spent(choice)
        return [x for x in self.limits if spent[x.cost] > x.bound + TOLERANCE * self._scale[x.cost]]

    def rows(self) -> tuple[Floats, Floats]:
        """The limits as `A x <= b` for solvers: A [M, R, V] and b [M], one per limited cost. Costs are scaled to a range of 1."""
        tightest: dict[int, float] = {}
        for limit in self.limits:
            tightest[limit.cost] = min(limit.bound, tightest.get(limit.cost, math.inf))
        index = np.array(list(tightest), dtype=np.intp)
        bounds = np.array(list(tightest.values()), dtype=np.float64)
        scale = self._scale[index]
        return self.costs[index] / scale[:, None, None], (bounds - self.constants[index]) / scale + TOLERANCE

    def cheapest(self, cost: int) -> float:
        """The least that any architecture spends of one cost."""
        return float(np.where(np.isfinite(self.score), self.costs[cost], np.inf).min(axis=1).sum() + self.constants[cost])

    def check_each_limit(self) -> None:
        """Raises Infeasible for the first limit that no architecture meets, even with no other limit."""
        for limit in self.limits:
            best = self.cheapest(limit.cost)
            if best > limit.bound + TOLERANCE * self._scale[limit.cost]:
                raise Infeasible(limit.name, limit.sense, limit.asked, limit.reached(best), limit.unit)

    def at_least(self, limit: Limit) -> Problem:
        """The same problem, where the limited cost must not be below the limit's bound.

        What is saved of that cost becomes a cost of its own, with an upper limit.
        """
        values = np.where(np.isfinite(self.score), self.costs[limit.cost], -np.inf)
        highest = values.max(axis=1)
        saved = np.where(np.isfinite(values), highest[:, None] - values, 0.0)
        total = math.fsum([*highest, self.constants[limit.cost]])
        mirrored = replace(limit, cost=len(self.costs), bound=total - limit.bound, minus=total)
        return replace(
            self,
            costs=np.concatenate([self.costs, saved[None]]),
            cost_names=(*self.cost_names, f"saved_{self.cost_names[limit.cost]}"),
            constants=np.append(self.constants, 0.0),
            limits=(*self.limits, mirrored),
        )

    def with_limits(self, limits: Iterable[Limit]) -> Problem:
        return replace(self, limits=tuple(limits))

    def without_limit(self, limit: Limit, score: Floats | None = None) -> Problem:
        """The problem without one limit. It minimises `score` [R, V] where that is given, else its own."""
        kept = tuple(x for x in self.limits if x is not limit)
        return replace(self, limits=kept, score=self.score if score is None else score)

    def apart_from(self, earlier: Choice, layers: int) -> Problem:
        """The same problem, where at least `layers` layers must differ from the choice `earlier`."""
        same = np.zeros_like(self.score)
        same[np.arange(len(earlier)), earlier] = self.weights
        total = float(self.weights.sum())
        limit = Limit("different_layers", len(self.costs), total - layers, layers, "layers", minus=total)
        return replace(
            self,
            costs=np.concatenate([self.costs, same[None]]),
            cost_names=(*self.cost_names, "same_layers"),
            constants=np.append(self.constants, 0.0),
            limits=(*self.limits, limit),
        )

    def distance(self, a: Choice, b: Choice) -> int:
        """The number of layers in which two choices differ."""
        return int(self.weights[a != b].sum())


@dataclass(frozen=True, eq=False)
class Solution:
    """A choice within the limits. No choice within the limits has an objective below `bound`. `status`: see `Architecture`."""

    choice: Choice
    objective: float
    bound: float
    status: str
    solve_s: float
    method: str = ""

    @property
    def gap(self) -> float:
        return abs(self.objective - self.bound) / max(abs(self.objective), 1e-12)


def verified_solution(problem: Problem, choice: Choice, bound: float, status: str, solve_s: float, method: str) -> Solution:
    """A solution with limits and objective recomputed exactly, so that a searcher's own arithmetic is never trusted."""
    broken = problem.violated(choice)
    assert not broken, f"{method} returned a choice that breaks {', '.join(map(str, broken))}: a bug of the searcher"
    objective = problem.objective(choice)
    assert math.isfinite(objective), f"{method} chose a variant that its layer does not have: a bug of the searcher"
    return Solution(choice, objective, min(bound, objective), status, solve_s, method)


def nearest_miss(problem: Problem, choices: Sequence[Choice], note: str) -> Infeasible:
    """The error of a searcher that found no choice and proved nothing.

    It takes the try that breaks the fewest limits, and names the limit which that one misses by the largest margin.
    """
    tries = [(problem.violated(choice), problem.spent(choice)) for choice in choices]
    broken, spent = min(tries, key=lambda t: len(t[0]))
    worst = max(broken, key=lambda x: (spent[x.cost] - x.bound) / problem._scale[x.cost])
    return Infeasible(worst.name, worst.sense, worst.asked, worst.reached(spent[worst.cost]), worst.unit, note)
