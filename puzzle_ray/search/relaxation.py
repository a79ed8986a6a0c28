"""Lower bounds and first answers for `min sum score[r, x_r]` subject to `sum A[m, r, x_r] <= b[m]`.

Shapes: M limits, R rows, V choices.
For any multipliers y >= 0, the Lagrangian sum_r min_v (score + y.A) - y.b is a lower bound.
Choice v of row r can be part of an answer below `target` only if its excess over its row's minimum is at most target - bound.
The best multipliers give the bound of the linear relaxation, since every row is a simplex.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from puzzle_ray.search.problem import Choice, Floats, Problem

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Relaxation:
    """A lower bound, the multipliers [M] that prove it, and every choice's excess [R, V] over its row's best."""

    bound: float
    multipliers: Floats
    excess: Floats


def relaxed(score: Floats, rows: Floats, bounds: Floats, multipliers: Floats) -> Relaxation:
    """The Lagrangian relaxation at given multipliers >= 0."""
    reduced = score + np.tensordot(multipliers, rows, 1)
    least = reduced.min(axis=1)
    return Relaxation(float(least.sum() - multipliers @ bounds), multipliers, reduced - least[:, None])


def undominated(score: Floats, rows: Floats) -> Bools:
    """[R, V]: the choices that no other choice of their row equals or beats in score and in every cost. Of equal ones, the first."""
    stacked = np.concatenate([score[None], rows])
    no_worse = np.ones((*score.shape, score.shape[1]), dtype=bool)
    better = np.zeros_like(no_worse)
    for values in stacked:
        no_worse &= values[:, :, None] <= values[:, None, :]  # [r, u, v]: u is no worse than v
        better |= values[:, :, None] < values[:, None, :]
    first = np.arange(score.shape[1])[:, None] < np.arange(score.shape[1])[None, :]
    dominated = (no_worse & (better | first)).any(axis=1)
    kept: Bools = ~dominated & np.isfinite(score)
    return kept


def span_of(score: Floats) -> float:
    """The largest difference between two scores of one row. 1 where there is none."""
    highest = np.where(np.isfinite(score), score, -np.inf).max(axis=1)
    return float((highest - score.min(axis=1)).max()) or 1.0


def best_multipliers(score: Floats, rows: Floats, bounds: Floats, ceiling: float) -> Relaxation:
    """Maximises the Lagrangian bound by Newton steps on its smoothed form: softmin at temperature t, and a barrier t.log y.

    t goes to 0. The search ends early once the bound exceeds `ceiling`, since then no answer is below it.
    """
    span = span_of(score)
    y = np.full(len(bounds), 0.5 * span)
    best = relaxed(score, rows, bounds, np.zeros(len(bounds)))
    flat = rows.reshape(len(bounds), -1)
    temperature = span
    while temperature > 1e-7 * span and len(bounds) and best.bound <= ceiling:
        for _ in range(3):
            now = relaxed(score, rows, bounds, y)
            if now.bound > best.bound:
                best = now
            soft = np.exp(-now.excess / temperature)
            soft /= soft.sum(axis=1, keepdims=True)
            mean = np.einsum("rv,mrv->mr", soft, rows)
            gradient = mean.sum(axis=1) - bounds + temperature / y
            hessian = ((flat * soft.ravel()) @ flat.T - mean @ mean.T) / temperature + np.diag(temperature / y**2)
            hessian[np.diag_indices_from(hessian)] += 1e-14 * np.trace(hessian)
            step = np.linalg.solve(hessian, gradient)
            shrinking = step < 0
            length = min(1.0, 0.9 * float(np.min(-y[shrinking] / step[shrinking]))) if shrinking.any() else 1.0
            y = np.minimum(y + length * step, 1e12 * span)
        temperature *= 0.5
    return best


def repaired(score: Floats, rows: Floats, bounds: Floats, relaxation: Relaxation) -> Choice | None:
    """A choice within the limits near the relaxation's, or None where none is found.

    While a limit is broken, the change of least damage per violation removed is made. Then every change that lowers the score is made.
    """
    layers = np.arange(len(score))
    choice = relaxation.excess.argmin(axis=1)
    for _ in range(20 * len(score)):
        loads = rows[:, layers, choice].sum(axis=1)
        over = np.maximum(loads - bounds, 0.0)
        after = loads[:, None, None] + rows - rows[:, layers, choice][:, :, None]  # [M, R, V]: loads with one row changed
        damage = score - score[layers, choice][:, None]
        left = np.maximum(after - bounds[:, None, None], 0.0).sum(axis=0)
        if over.any():
            gain = over.sum() - left
            rate = np.where((gain > 1e-15) & np.isfinite(score), damage / np.maximum(gain, 1e-15), np.inf)
        else:
            rate = np.where((left == 0) & (damage < 0), damage, np.inf)
        move = int(rate.argmin())
        if not np.isfinite(rate.flat[move]):
            return None if over.any() else choice
        row, variant = np.unravel_index(move, rate.shape)
        choice = choice.copy()
        choice[row] = variant
    return None


def lower_bound(problem: Problem) -> float:
    """The bound of the linear relaxation: no choice within the limits has a lower objective."""
    rows, bounds = problem.rows()
    score = problem.score
    return best_multipliers(score, rows, bounds, float(np.where(np.isfinite(score), score, 0.0).max(axis=1).sum())).bound
