"""Search problems as plain numbers."""

from __future__ import annotations

import numpy as np

from puzzle_ray.search.problem import Limit, Problem


def make_problem(score, costs, bounds, weights=None) -> Problem:
    score, costs = np.asarray(score, float), np.asarray(costs, float)
    rows, width = score.shape
    names = tuple(f"cost{i}" for i in range(len(costs)))
    limits = tuple(Limit(name, i, float(b), float(b)) for i, (name, b) in enumerate(zip(names, bounds, strict=True)))
    weights = np.ones(rows, dtype=np.intp) if weights is None else np.asarray(weights, dtype=np.intp)
    labels = tuple(tuple(f"v{v}" for v in range(width)) for _ in range(rows))
    return Problem(score, costs, names, np.zeros(len(costs)), weights, labels, limits)


def random_problem(seed: int, rows: int, width: int, limits: int, tightness: float) -> Problem:
    """Costs that go together and damage that falls as they rise, as in a real library."""
    rng = np.random.default_rng(seed)
    size = np.sort(rng.random((rows, width)), axis=1)
    costs = size[None] * (1 + 0.1 * rng.standard_normal((limits, rows, width)))
    score = (1 - size) * rng.lognormal(0, 0.5, (rows, 1)) * (1 + 0.05 * rng.standard_normal((rows, width)))
    least, most = costs.min(axis=2).sum(axis=1), costs.max(axis=2).sum(axis=1)
    return make_problem(score, costs, least + tightness * (most - least))
