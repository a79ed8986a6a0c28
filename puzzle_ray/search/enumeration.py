"""Exact search by enumeration: row by row, keeping the partial choices that can still lead to an objective below a target.

The lower bound is a Lagrangian relaxation that keeps one limit, the heaviest, exact. The other limits have multipliers y.
The rows that are still open are then a knapsack with one limit. It is solved once for every remaining budget: per suffix of rows,
a frontier of cost against penalised score. The target starts at the relaxation's bound and rises until a choice is found below it.
So no good first choice is needed.
Shapes: M limits, R rows, V choices, K partial choices kept.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from puzzle_ray.search.problem import Choice, Floats
from puzzle_ray.search.relaxation import Bools, Relaxation, best_multipliers, relaxed, repaired, span_of

FIRST_STATES = 8192  # partial choices kept at first; then the bound is sharpened, then more are kept
SHARPENING_STEPS = 16  # a few milliseconds each
WIDEST = 1000  # open choices of all rows together; with more, the bound is too weak for enumeration
FRONTIER = 4096  # points of a frontier; a longer one is made coarse such that it stays a lower bound
SAME_LOAD = 1e-14  # of a limit's range: a hundredth of the tolerance that a limit is checked with
EPSILON = 1e-11  # of the score's span: an answer counts as better only if it is better by more than this


@dataclass(frozen=True, eq=False)
class Frontier:
    """For a suffix of rows: `cost` of the heavy limit, ascending, and `value`, the least penalised score within it, falling."""

    cost: Floats
    value: Floats

    def within(self, budget: Floats) -> Floats:
        """The least penalised score at every remaining budget. +inf where nothing fits."""
        if not len(self.cost):
            return np.full(len(budget), np.inf)
        index = np.searchsorted(self.cost, budget, side="right") - 1
        return np.where(index >= 0, self.value[np.maximum(index, 0)], np.inf)


class Core:
    """The core problem below a target: every row with the choices that an answer below the target can have.

    `order` is the order in which rows are decided. `live[i]` are the choices of row `order[i]` whose excess is small enough.
    """

    def __init__(self, score: Floats, rows: Floats, bounds: Floats, relaxation: Relaxation, target: float) -> None:
        self.score, self.rows, self.bounds, self.relaxation, self.target = score, rows, bounds, relaxation, target
        gap = target - relaxation.bound + EPSILON * span_of(score)
        alive = relaxation.excess <= gap
        ranked = np.sort(np.where(alive, relaxation.excess, np.inf), axis=1)
        second = ranked[:, 1] if ranked.shape[1] > 1 else np.full(len(ranked), np.inf)
        self.order = np.argsort(
            -second, kind="stable"
        )  # rows with one choice (inf) first, those with the closest second choice last
        self.live = [np.flatnonzero(alive[row]) for row in self.order]
        self.gap = gap
        least = np.where(alive, rows, np.inf).min(axis=2)[:, self.order]
        self.least_rest = np.zeros((len(bounds), len(score) + 1))  # [M, R + 1]: the least that a suffix of rows spends
        self.least_rest[:, :-1] = np.cumsum(least[:, ::-1], axis=1)[:, ::-1]
        spread = np.where(alive, rows, -np.inf).max(axis=2).sum(axis=1) - least.sum(axis=1)
        self.heavy = int(np.argmax(relaxation.multipliers * spread))
        others = relaxation.multipliers.copy()
        others[self.heavy] = 0.0
        self.constant = float(others @ bounds)
        self.penalised = score + np.tensordot(others, rows, 1)
        self.frontiers, self.relaxed_choice = self._suffix_frontiers()
        budget = np.array([bounds[self.heavy]])
        self.bound = max(float(self.frontiers[0].within(budget)[0]) - self.constant, relaxation.bound)

    def _suffix_frontiers(self) -> tuple[list[Frontier], Choice]:
        """The frontier of every suffix of rows, order[i:], and the best choice of the longest suffix within the whole budget."""
        cost, value, excess = np.zeros(1), np.zeros(1), np.zeros(1)
        frontiers, trail = [Frontier(cost, value)], []
        heavy, bound = self.rows[self.heavy], float(self.bounds[self.heavy])
        limit = bound - (self.least_rest[self.heavy, 0] - self.least_rest[self.heavy])  # without what earlier rows must spend
        for i in range(len(self.order) - 1, -1, -1):
            row, live = self.order[i], self.live[i]
            cost = (cost[:, None] + heavy[row, live]).ravel()
            value = (value[:, None] + self.penalised[row, live]).ravel()
            excess = (excess[:, None] + self.relaxation.excess[row, live]).ravel()
            kept = np.flatnonzero((excess <= self.gap) & (cost <= limit[i]))
            kept = kept[np.lexsort((value[kept], cost[kept]))]
            falling = np.ones(len(kept), dtype=bool)
            falling[1:] = value[kept][1:] < np.minimum.accumulate(value[kept])[:-1]
            kept = kept[falling]
            if len(kept) > FRONTIER:
                cost, value, excess, kept = _coarse(cost[kept], value[kept], excess[kept], kept)
            else:
                cost, value, excess = cost[kept], value[kept], excess[kept]
            trail.append((row, kept // len(live), live[kept % len(live)]))
            frontiers.append(Frontier(cost, value))
        choice = np.zeros(len(self.order), dtype=np.intp)
        at = int(np.searchsorted(cost, bound, side="right")) - 1
        for row, parents, variants in reversed(trail if at >= 0 else []):
            choice[row] = variants[at]
            at = int(parents[at])
        return frontiers[::-1], choice

    def walk(self, capacity: int, deadline: float) -> tuple[Choice | None, float]:
        """The best choice at or below the target, or None. Also a lower bound on the partial choices that were dropped for lack of room."""
        loads, score, penalised = np.zeros((len(self.bounds), 1)), np.zeros(1), np.zeros(1)
        dropped = math.inf
        trail: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []  # of every row; the largest array of a whole search
        for i, (row, live) in enumerate(zip(self.order, self.live, strict=True)):
            if time.perf_counter() > deadline:
                return None, self.bound
            new_penalised = (penalised[:, None] + self.penalised[row, live]).ravel()
            heavy_load = (loads[self.heavy][:, None] + self.rows[self.heavy, row, live]).ravel()
            bound = new_penalised + self.frontiers[i + 1].within(self.bounds[self.heavy] - heavy_load) - self.constant
            kept = np.flatnonzero(bound <= self.target)
            parents, variants = kept // len(live), live[kept % len(live)]
            new_loads = loads[:, parents] + self.rows[:, row, variants]
            fits = (new_loads + self.least_rest[:, i + 1, None] <= self.bounds[:, None]).all(axis=0)
            kept, parents, variants, new_loads = kept[fits], parents[fits], variants[fits], new_loads[:, fits]
            new_score = score[parents] + self.score[row, variants]
            chosen = _merged(new_loads, new_score) if len(kept) > capacity else np.arange(len(kept))
            if len(chosen) > capacity:
                chosen = chosen[np.argpartition(bound[kept[chosen]], capacity)]
                dropped = min(dropped, float(bound[kept[chosen[capacity:]]].min()))
                chosen = chosen[:capacity]
            parents, variants = parents[chosen], variants[chosen]
            loads, penalised, score = new_loads[:, chosen], new_penalised[kept[chosen]], new_score[chosen]
            trail.append((parents.astype(np.int32), variants.astype(np.int32)))
            if not len(parents):
                return None, dropped
        choice = np.zeros(len(self.order), dtype=np.intp)
        at = int(score.argmin())
        for row, (earlier, picked) in zip(self.order[::-1], reversed(trail), strict=True):
            choice[row] = picked[at]
            at = int(earlier[at])
        return choice, dropped


def _merged(loads: Floats, score: Floats) -> NDArray[np.intp]:
    """Of partial choices with equal loads, the one of least score. Layers of one shape have many such."""
    grid = np.round(loads / SAME_LOAD).astype(np.int64)
    key = (
        np.random.default_rng(0).integers(1, 2**62, len(grid)) @ grid
    )  # may overflow; partial choices with equal keys are compared below
    order = np.lexsort((score, key))
    again = (grid[:, order[1:]] == grid[:, order[:-1]]).all(axis=0)
    return order[np.append(True, ~again)]


def _coarse(
    cost: Floats, value: Floats, excess: Floats, kept: NDArray[np.intp]
) -> tuple[Floats, Floats, Floats, NDArray[np.intp]]:
    """Joins neighbouring points of a frontier into one with the group's least cost and its least value.

    The joined point gets the excess that a choice of that cost and value would have: excess is value plus multiplier times cost, less a
    constant. So of two points the one that is no worse in cost and value has no more excess either. A point that displaces another one
    is therefore never dropped for its excess where the displaced one would have stayed, and the frontier stays a lower bound.
    """
    starts = np.linspace(0, len(cost), FRONTIER // 2, endpoint=False).astype(np.intp)
    ends = np.append(starts[1:], len(cost)) - 1
    return cost[starts], value[ends], excess[starts] - (value[starts] - value[ends]), kept[ends]


def sharpened(core: Core, steps: int, deadline: float) -> Relaxation:
    """Better multipliers for the bound that keeps the heavy limit exact, by Polyak's subgradient steps towards the target."""
    score, rows, bounds, target = core.score, core.rows, core.bounds, core.target
    best, share, stalled = core, 1.0, 0
    room = 1.5 * np.count_nonzero(core.relaxation.excess <= core.gap)
    layers, norm = np.arange(len(score)), np.abs(rows).max(axis=(1, 2)) ** 2
    for _ in range(steps):
        multipliers = core.relaxation.multipliers
        subgradient = rows[:, layers, core.relaxed_choice].sum(axis=1) - bounds
        subgradient[core.heavy] = 0.0
        direction = np.where((multipliers <= 0) & (subgradient < 0), 0.0, subgradient / norm)
        slope = float(direction @ subgradient)
        if slope <= 0 or core.bound >= target or time.perf_counter() > deadline:
            break
        multipliers = np.maximum(multipliers + share * (target - core.bound) / slope * direction, 0.0)
        relaxation = relaxed(score, rows, bounds, multipliers)
        if (
            np.count_nonzero(relaxation.excess <= target - relaxation.bound) > room
        ):  # this step opens too many choices: take half of it
            core, share, stalled = best, share * 0.5, 0
            continue
        core = Core(score, rows, bounds, relaxation, target)
        stalled = 0 if core.bound > best.bound else stalled + 1
        if stalled == 0:
            best = core
        elif stalled == 4:
            core, share, stalled = best, share * 0.5, 0
    return best.relaxation


@dataclass(frozen=True, eq=False)
class Outcome:
    """The best choice found, or None. No choice has an objective below `bound`.

    `proven`: the choice is the best, or it is None because there is none. `live` [R, V]: the choices that a better answer can have.
    """

    choice: Choice | None
    bound: float
    proven: bool
    live: Bools


def minimise(score: Floats, rows: Floats, bounds: Floats, max_states: int, deadline: float) -> Outcome:
    """The best choice, exactly where `max_states` partial choices suffice. Else the best one found and the proven bound."""
    span = span_of(score)
    ceiling = float(np.where(np.isfinite(score), score, -np.inf).max(axis=1).sum()) + span
    relaxation = best_multipliers(score, rows, bounds, ceiling)
    if relaxation.bound > ceiling:
        return Outcome(None, math.inf, True, np.isfinite(score))
    choice = repaired(score, rows, bounds, relaxation)
    layers = np.arange(len(score))
    best = math.inf if choice is None else float(score[layers, choice].sum())
    proven = relaxation.bound
    steps = np.sort(relaxation.excess[np.isfinite(relaxation.excess)])
    first_step = max(float(steps[min(len(steps) - 1, 2 * len(score))]), 1e-6 * span)
    target, capacity, sharpen = min(best, proven + first_step), min(FIRST_STATES, max_states), True
    while best - EPSILON * span > proven and time.perf_counter() < deadline:
        if np.count_nonzero(relaxation.excess <= target - relaxation.bound) > WIDEST:
            break
        core = Core(score, rows, bounds, relaxation, target)
        candidate, dropped = (None, math.inf) if core.bound > target else core.walk(capacity, deadline)
        if candidate is not None and (value := float(score[layers, candidate].sum())) < best:
            best, choice = value, candidate
        proven = max(proven, min(target, max(dropped, core.bound)))
        if best - EPSILON * span <= proven:
            break
        if dropped == math.inf:  # nothing was dropped: no choice at or below the target remains unseen
            if choice is None and target >= ceiling:
                return Outcome(None, math.inf, True, np.isfinite(score))
            target = min(best - EPSILON * span, ceiling, relaxation.bound + 2.0 * (target - relaxation.bound))
        elif sharpen:
            target, sharpen = min(target, best - EPSILON * span), False
            relaxation = sharpened(Core(score, rows, bounds, relaxation, target), SHARPENING_STEPS, deadline)
        elif capacity < max_states:
            capacity, target = min(8 * capacity, max_states), min(target, best - EPSILON * span)
        else:
            break
    done = choice is not None and best - EPSILON * span <= proven
    gap = best - relaxation.bound + EPSILON * span
    live: Bools = (relaxation.excess <= gap) & np.isfinite(score)
    return Outcome(choice, min(proven, best), done, live)
