"""The bound behind the exact search stays a lower bound where its frontiers are so long that points have to be joined."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from search_problems import make_problem

from puzzle_ray.errors import Infeasible
from puzzle_ray.search import enumeration
from puzzle_ray.search.enumeration import Core
from puzzle_ray.search.mip import solve_exactly
from puzzle_ray.search.problem import Limit, Problem
from puzzle_ray.search.relaxation import best_multipliers, span_of

COARSE, WHOLE = 8, 10**9  # points of a frontier


@contextmanager
def frontiers_of(points: int):
    before, enumeration.FRONTIER = enumeration.FRONTIER, points
    try:
        yield
    finally:
        enumeration.FRONTIER = before


def drawn_problem(seed: int, rows: tuple[int, int], width: tuple[int, int], kind: str) -> Problem:
    """Damage that falls as costs rise (`alike`), unrelated numbers (`free`), or whole numbers with many ties (`whole`).

    Some rows stand for two layers that must agree: their scores and costs are sums over both.
    """
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(*rows)), int(rng.integers(*width)))
    limits = int(rng.integers(1, 4))

    def layers():
        size = rng.random(shape)
        if kind == "free":
            return rng.random(shape), rng.random((limits, *shape))
        costs = size * (1 + rng.choice([0.1, 0.5, 2.0]) * rng.random((limits, *shape)))
        damage = rng.lognormal(0, 0.5, (shape[0], 1)) * (1 + rng.choice([0.05, 0.5]) * rng.standard_normal(shape))
        score = (1 - size) * damage
        return (np.round(20 * score), np.round(20 * costs)) if kind == "whole" else (score, costs)

    (score, costs), (more_score, more_costs) = layers(), layers()
    pairs = rng.random(shape[0]) < 0.2
    score, costs = score + pairs[:, None] * more_score, costs + pairs[:, None] * more_costs
    least, most = costs.min(axis=2).sum(axis=1), costs.max(axis=2).sum(axis=1)
    problem = make_problem(score, costs, least + rng.uniform(0.1, 0.7, limits) * (most - least), 1 + pairs)
    if rng.random() < 0.3:  # a range: between a share of what the first limit allows, and that limit
        bound = problem.limits[0].bound
        asked = float(least[0] + rng.uniform(0.5, 1.0) * (bound - least[0]))
        problem = problem.at_least(Limit("cost0", 0, asked, asked))
    return problem


KINDS = st.sampled_from(["alike", "free", "whole"])
SEEDS = st.integers(0, 2**32 - 1)


def objective(solve):
    try:
        solution = solve()
    except Infeasible:
        return None
    assert solution.status == "optimal"
    return solution.objective


@settings(max_examples=60, deadline=None)
@given(SEEDS, KINDS)
def test_the_answer_is_that_of_highs_however_coarse_the_bound(seed, kind):
    problem = drawn_problem(seed, (5, 14), (3, 7), kind)
    with frontiers_of(COARSE):
        found = objective(lambda: solve_exactly(problem, time_limit_s=60))
    expected = objective(lambda: solve_exactly(problem, presolve=False))
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-9, abs=1e-9))


@settings(max_examples=200, deadline=None)
@given(SEEDS, KINDS, st.sampled_from([0.05, 0.1, 0.2, 0.4]))
@example(19, "free", 0.2)
@example(408, "alike", 0.05)
@example(1097, "whole", 0.1)
def test_a_coarse_frontier_is_nowhere_above_the_whole_one(seed, kind, share):
    """For every suffix of rows and every cost. `share` is how far above the relaxation the target is, in spans of a row's score."""
    problem = drawn_problem(seed, (12, 30), (3, 9), kind)
    rows, bounds = problem.rows()
    span, ceiling = span_of(problem.score), float(problem.score.max(axis=1).sum())
    relaxation = best_multipliers(problem.score, rows, bounds, ceiling)
    if relaxation.bound > ceiling:
        return  # there is no answer at all
    cores = []
    for points in (COARSE, WHOLE):
        with frontiers_of(points):
            cores.append(Core(problem.score, rows, bounds, relaxation, relaxation.bound + share * span))
    for coarse, whole in zip(cores[0].frontiers, cores[1].frontiers, strict=True):
        assert (coarse.within(whole.cost) <= whole.value + 1e-9 * span).all()
    assert cores[0].bound <= cores[1].bound + 1e-9 * span


def test_an_answer_that_the_joined_points_once_hid():
    """A joined point was dropped for an excess that its cost and value do not have. The search then proved 14.4098 to be optimal."""
    problem = drawn_problem(100311, (12, 30), (3, 9), "alike")
    expected = solve_exactly(problem).objective
    with frontiers_of(COARSE):
        assert solve_exactly(problem).objective == pytest.approx(expected, rel=1e-12) == pytest.approx(14.382217402802457)
