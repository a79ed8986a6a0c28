"""Exact search by enumeration: layer by layer, keeping only the partial choices that can still lead below a target.

The bound is a Lagrangian relaxation that keeps its heaviest limit exact: with multipliers y on the other limits, the
rest of the rows is a knapsack with one limit, solved once for every remaining budget (a frontier of cost against
penalised score per suffix). The target rises from the relaxation's bound until an answer is found below it, so no good
first answer is needed.
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

FIRST_STATES = 8192  # partial choices kept at first, before the bound is sharpened and then the room widened
SHARPENING_STEPS = 16  # a few milliseconds each
WIDEST = 1000  # choices still open in all rows together; with more the bound is too weak for enumeration
FRONTIER = 4096  # points of a frontier; a longer one is coarsened downwards, which keeps it a bound
SAME_LOAD = 1e-14  # of a limit's range: a hundredth of the tolerance that a limit is checked with
EPSILON = 1e-11  # of the score's span: an answer that is better by less is no better


@dataclass(frozen=True, eq=False)
class Frontier:
    """Of the rows from one on: `cost` of the heavy limit, ascending; the least penalised score within it, falling."""

    cost: Floats
    value: Floats

    def within(self, budget: Floats) -> Floats:
        """The least penalised score at every remaining budget, +inf where nothing fits."""
        if not len(self.cost):
            return np.full(len(budget), np.inf)
        index = np.searchsorted(self.cost, budget, side="right") - 1
        return np.where(index >= 0, self.value[np.maximum(index, 0)], np.inf)


class Core:
    """What is left to decide below a target: rows with more than one live choice, in the order they are decided.

    `live[i]` are the choices of row `order[i]` whose excess allows an answer below the target.
    """

    def __init__(self, score: Floats, rows: Floats, bounds: Floats, relaxation: Relaxation, target: float) -> None:
        self.score, self.rows, self.bounds, self.relaxation, self.target = score, rows, bounds, relaxation, target
        gap = target - relaxation.bound + EPSILON * span_of(score)
        alive = relaxation.excess <= gap
        ranked = np.sort(np.where(alive, relaxation.excess, np.inf), axis=1)
        second = ranked[:, 1] if ranked.shape[1] > 1 else np.full(len(ranked), np.inf)
        self.order = np.argsort(-second, kind="stable")  # rows with one choice (inf) first, the nearest ties last
        self.live = [np.flatnonzero(alive[row]) for row in self.order]
        self.gap = gap
        least = np.where(alive, rows, np.inf).min(axis=2)[:, self.order]
        self.least_rest = np.zeros((len(bounds), len(score) + 1))  # [M, R + 1]: what the rows from one on spend at least
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
        """The frontiers of rows order[i:], and the choice behind the first one's best within the whole budget."""
        cost, value, excess = np.zeros(1), np.zeros(1), np.zeros(1)
        frontiers, trail = [Frontier(cost, value)], []
        heavy, bound = self.rows[self.heavy], float(self.bounds[self.heavy])
        most = bound - (self.least_rest[self.heavy, 0] - self.least_rest[self.heavy])  # less what earlier rows must spend
        for i in range(len(self.order) - 1, -1, -1):
            row, live = self.order[i], self.live[i]
            cost = (cost[:, None] + heavy[row, live]).ravel()
            value = (value[:, None] + self.penalised[row, live]).ravel()
            excess = (excess[:, None] + self.relaxation.excess[row, live]).ravel()
            kept = np.flatnonzero((excess <= self.gap) & (cost <= most[i]))
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
        """The best choice at or below the target, or None; and a bound on all that lack of room or time left out."""
        loads, score, penalised = np.zeros((len(self.bounds), 1)), np.zeros(1), np.zeros(1)
        dropped = math.inf
        trail: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
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
            trail.append((parents, variants))
            if not len(parents):
                return None, dropped
        choice = np.zeros(len(self.order), dtype=np.intp)
        at = int(score.argmin())
        for row, (parents, variants) in zip(self.order[::-1], reversed(trail), strict=True):
            choice[row] = variants[at]
            at = int(parents[at])
        return choice, dropped


def _merged(loads: Floats, score: Floats) -> NDArray[np.intp]:
    """Of the partial choices with the same loads (as layers of one shape bring about), the one of least score."""
    grid = np.round(loads / SAME_LOAD).astype(np.int64)
    key = np.random.default_rng(0).integers(1, 2**62, len(grid)) @ grid  # wraps around; equal keys are compared below
    order = np.lexsort((score, key))
    again = (grid[:, order[1:]] == grid[:, order[:-1]]).all(axis=0)
    return order[np.append(True, ~again)]


def _coarse(
    cost: Floats, value: Floats, excess: Floats, kept: NDArray[np.intp]
) -> tuple[Floats, Floats, Floats, NDArray[np.intp]]:
    """Joins neighbours of a frontier: each group keeps its least cost, value and excess, so it stays a bound."""
    starts = np.linspace(0, len(cost), FRONTIER // 2, endpoint=False).astype(np.intp)
    ends = np.append(starts[1:], len(cost)) - 1
    return cost[starts], value[ends], np.minimum.reduceat(excess, starts), kept[ends]


def sharpened(core: Core, steps: int, deadline: float) -> Relaxation:
    """Better multipliers for the bound with an exact heavy limit: Polyak's subgradient steps towards the target."""
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
        if np.count_nonzero(relaxation.excess <= target - relaxation.bound) > room:  # so long a step reopens too much
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
    """The best choice found, or None; no choice has a lower objective than `bound`.

    `proven`: the choice is the best, or None because there is none. `live` [R, V]: what a better answer can contain.
    """

    choice: Choice | None
    bound: float
    proven: bool
    live: Bools


def minimise(score: Floats, rows: Floats, bounds: Floats, max_states: int, deadline: float) -> Outcome:
    """Exact where `max_states` partial choices suffice, else the best found and the bound proven."""
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
        found, dropped = (None, math.inf) if core.bound > target else core.walk(capacity, deadline)
        if found is not None and (value := float(score[layers, found].sum())) < best:
            best, choice = value, found
        proven = max(proven, min(target, max(dropped, core.bound)))
        if best - EPSILON * span <= proven:
            break
        if dropped == math.inf:  # nothing at or below the target was missed
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
