"""The exact search against brute force, and what it says when it cannot finish or there is no answer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_problems import make_problem, random_problem

from puzzle_ray.errors import ConfigError, Infeasible
from puzzle_ray.search import enumeration
from puzzle_ray.search.mip import solve_diverse, solve_exactly
from puzzle_ray.search.problem import Limit, Problem
from puzzle_ray.search.relaxation import best_multipliers, lower_bound
from puzzle_ray.search.searcher import Options, searchers

EXACT = {
    "presolve": {},
    "presolve, then HiGHS": {"max_states": 1},
    "HiGHS alone": {"presolve": False},
}


def brute_force(problem: Problem, earlier=(), distance: int = 0) -> float | None:
    """The least objective of all choices within the limits that differ enough from earlier ones; None without any."""
    allowed = [np.flatnonzero(np.isfinite(scores)) for scores in problem.score]
    objectives = [
        problem.objective(choice)
        for choice in map(np.array, itertools.product(*allowed))
        if not problem.violated(choice) and all(problem.distance(choice, other) >= distance for other in earlier)
    ]
    return min(objectives, default=None)


@st.composite
def problems(draw) -> Problem:
    """Small whole numbers, so that ties, equal choices and limits met exactly are common; some layers are fixed."""
    rows, width, limits = draw(st.integers(3, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    if rows == 5:
        width = min(width, 4)
    values = st.integers(0, 12)
    numbers = draw(st.lists(values, min_size=rows * width * (limits + 1), max_size=rows * width * (limits + 1)))
    table = np.array(numbers, float).reshape(limits + 1, rows, width)
    if draw(st.booleans()):
        table *= np.random.default_rng(draw(st.integers(0, 99))).uniform(0.9, 1.1, table.shape)
    score, costs = table[0], table[1:]
    for row in draw(st.lists(st.integers(0, rows - 1), max_size=2)):
        score[row, 1:] = np.inf  # this layer was fixed by the user
    least, most = costs.min(axis=2).sum(axis=1), costs.max(axis=2).sum(axis=1)
    share = np.array(draw(st.lists(st.floats(0, 1), min_size=limits, max_size=limits)))
    weights = draw(st.lists(st.integers(1, 2), min_size=rows, max_size=rows))
    return make_problem(score, costs, np.floor(least + share * (most - least)), weights)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_it_is_as_good_as_brute_force(problem):
    best = brute_force(problem)
    if best is None:
        with pytest.raises(Infeasible):
            solve_exactly(problem)
        return
    solution = solve_exactly(problem)
    assert solution.objective == pytest.approx(best, rel=1e-12, abs=1e-9)
    assert solution.status == "optimal" and solution.gap <= 1e-9
    assert not problem.violated(solution.choice)


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(0, 1))
def test_minimums_are_kept_exactly(problem, share):
    """A minimum on the first cost, somewhere in its range, besides the limits."""
    finite = np.isfinite(problem.score)
    lowest = np.where(finite, problem.costs[0], np.inf).min(axis=1).sum()
    most = np.where(finite, problem.costs[0], -np.inf).max(axis=1).sum()
    least = float(np.floor(lowest + share * (most - lowest)))
    ranged = problem.at_least(Limit("cost0", 0, least, least))
    allowed = [np.flatnonzero(row) for row in finite]
    within = [c for c in map(np.array, itertools.product(*allowed)) if not problem.violated(c)]
    objectives = [problem.objective(c) for c in within if problem.spent(c)[0] >= least - 1e-9]
    if not objectives:
        with pytest.raises(Infeasible):
            solve_exactly(ranged)
        return
    solution = solve_exactly(ranged)
    assert solution.objective == pytest.approx(min(objectives), rel=1e-12, abs=1e-9)
    assert problem.spent(solution.choice)[0] >= least - 1e-9


@settings(max_examples=40, deadline=None)
@given(problems(), st.sampled_from(["presolve, then HiGHS", "HiGHS alone"]))
def test_highs_through_python_mip_is_as_good_as_brute_force(problem, way):
    best = brute_force(problem)
    if best is None:
        with pytest.raises(Infeasible):
            solve_exactly(problem, **EXACT[way])
        return
    solution = solve_exactly(problem, **EXACT[way])
    assert solution.objective == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert solution.status == "optimal" and not problem.violated(solution.choice)


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(1, 3))
def test_every_further_answer_is_the_best_of_those_that_differ_enough(problem, distance):
    if brute_force(problem) is None:
        return
    found = solve_diverse(problem, 3, distance)
    for k, solution in enumerate(found):
        earlier = [s.choice for s in found[:k]]
        assert solution.objective == pytest.approx(brute_force(problem, earlier, distance), rel=1e-12, abs=1e-9)
        assert all(problem.distance(solution.choice, other) >= distance for other in earlier)
        assert not problem.violated(solution.choice)
    if len(found) < 3:
        assert brute_force(problem, [s.choice for s in found], distance) is None


@pytest.mark.parametrize("way", EXACT)
@pytest.mark.parametrize("tightness", [0.1, 0.3, 0.6])
def test_five_layers_of_six_variants(way, tightness):
    problem = random_problem(1, 5, 6, 2, tightness)
    assert solve_exactly(problem, **EXACT[way]).objective == pytest.approx(brute_force(problem), rel=1e-12)


@pytest.mark.parametrize("way", EXACT)
def test_the_engines_agree_on_a_problem_too_large_for_brute_force(way):
    problem = random_problem(2, 24, 12, 3, 0.3)
    solution = solve_exactly(problem, **EXACT[way])
    assert solution.objective == pytest.approx(solve_exactly(problem).objective, rel=1e-9)
    assert ("HiGHS" in solution.method) == ("HiGHS" in way)


def test_it_stays_exact_when_its_bound_is_coarse(monkeypatch):
    problem = random_problem(3, 24, 12, 2, 0.3)
    exact = solve_exactly(problem, presolve=False).objective
    monkeypatch.setattr(enumeration, "FRONTIER", 8)
    assert solve_exactly(problem).objective == pytest.approx(exact, rel=1e-9)


def test_layers_of_one_shape_do_not_multiply_the_work():
    """80 equal layers have astronomically many equally good choices; what counts is how many take which variant."""
    scores, sizes = np.array([0.0, 1.0, 3.0, 7.0]), np.array([8.0, 5.0, 3.0, 2.0])
    problem = make_problem(np.tile(scores, (80, 1)), np.tile(sizes, (80, 1))[None], [331.0])
    counts = (c for c in itertools.product(range(81), repeat=3) if sum(c) <= 80)
    taken = [np.array([*c, 80 - sum(c)]) for c in counts]
    best = min(scores @ c for c in taken if sizes @ c <= 331)
    solution = solve_exactly(problem, time_limit_s=60)
    assert (solution.status, solution.objective) == ("optimal", pytest.approx(best))


def test_the_bound_of_the_relaxation_is_that_of_the_linear_programme():
    import mip

    problem = random_problem(4, 20, 8, 3, 0.3)
    rows, bounds = problem.rows()
    model = mip.Model(sense=mip.MINIMIZE, solver_name=mip.HIGHS)
    model.verbose = 0
    x = [[model.add_var(ub=1) for _ in scores] for scores in problem.score]
    model.objective = mip.xsum(problem.score[r, v] * x[r][v] for r in range(20) for v in range(8))
    for row in x:
        model += mip.xsum(row) == 1
    for a, b in zip(rows, bounds, strict=True):
        model += mip.xsum(a[r, v] * x[r][v] for r in range(20) for v in range(8)) <= b
    model.optimize()
    assert lower_bound(problem) <= model.objective_value + 1e-9
    assert lower_bound(problem) == pytest.approx(model.objective_value, rel=1e-5)


def test_out_of_time_it_returns_its_best_with_an_honest_bound():
    problem = random_problem(5, 80, 16, 2, 0.3)
    hurried, exact = solve_exactly(problem, time_limit_s=0.0), solve_exactly(problem)
    assert exact.status == "optimal" and exact.gap == 0
    assert hurried.status == "feasible" and hurried.gap > 0
    assert hurried.bound <= exact.objective <= hurried.objective
    assert not problem.violated(hurried.choice)


def test_out_of_time_highs_is_not_called_optimal():
    problem = random_problem(0, 100, 20, 10, 0.5)  # HiGHS needs minutes
    solution = solve_exactly(problem, time_limit_s=1.5, presolve=False)
    assert solution.status == "feasible" and solution.bound < solution.objective
    assert not problem.violated(solution.choice)


def test_without_any_answer_in_time_it_says_so():
    with pytest.raises(ConfigError, match="allow more time"):
        solve_exactly(random_problem(5, 40, 16, 4, 0.3), time_limit_s=0.0, presolve=False)


def test_a_limit_out_of_reach_is_named_with_the_best_reachable():
    problem = make_problem([[0, 1], [0, 2]], [[[5, 3], [5, 2]], [[1, 1], [1, 1]]], [4.0, 9.0])
    with pytest.raises(Infeasible) as caught:
        solve_exactly(problem)
    assert caught.value.args[:4] == ("cost0", "<=", 4.0, 5.0)


def test_limits_out_of_reach_only_together_are_all_named():
    """Saving one cost spends the other: each limit can be met, both cannot."""
    problem = make_problem([[0, 0], [0, 0]], [[[1, 4], [1, 4]], [[4, 1], [4, 1]]], [2.0, 4.0])
    with pytest.raises(Infeasible) as caught:
        solve_exactly(problem)
    name, _, asked, best, _, note = caught.value.args
    assert (name, asked, best) in {("cost0", 2.0, 8.0), ("cost1", 4.0, 8.0)}
    assert "cost0 <= 2" in note and "cost1 <= 4" in note


def test_loose_limits_leave_the_best_of_every_layer():
    problem = random_problem(6, 30, 10, 2, 1.0)
    assert solve_exactly(problem).objective == pytest.approx(problem.score.min(axis=1).sum())


def test_a_searcher_that_breaks_a_limit_is_caught():
    from puzzle_ray.search.problem import verified_solution

    problem = make_problem([[0, 1]], [[[5, 3]]], [4.0])
    with pytest.raises(AssertionError, match="cost0 <= 4"):
        verified_solution(problem, np.array([0]), 0.0, "optimal", 0.0, "x")


def test_multipliers_that_pass_the_ceiling_prove_that_there_is_no_answer():
    score = np.array([[0.0, 1.0]])
    rows = np.array([[[2.0, 1.0]]])
    assert best_multipliers(score, rows, np.array([0.5]), ceiling=2.0).bound > 2.0


@pytest.mark.parametrize("name", [name for name in searchers() if name not in ("depth", "max_params")])
@pytest.mark.parametrize("seed", range(3))
def test_every_searcher_meets_the_limits_and_none_beats_the_exact_one(name, seed):
    problem = random_problem(seed, 12, 6, 2, 0.6)
    solution = searchers()[name].solve(problem, Options(samples=50))
    assert not problem.violated(solution.choice)
    assert solution.objective == pytest.approx(problem.objective(solution.choice))
    exact = solve_exactly(problem).objective
    assert solution.bound <= exact + 1e-9 and solution.objective >= exact - 1e-9
    assert solution.status == ("optimal" if name == "mip" else "heuristic")


@pytest.mark.parametrize("name", [name for name in searchers() if name not in ("depth", "max_params")])
def test_every_searcher_says_which_limit_is_out_of_reach(name):
    with pytest.raises(Infeasible, match="cost0 <= 3"):
        searchers()[name].solve(make_problem([[0, 1], [0, 2]], [[[5, 2], [5, 2]]], [3.0]), Options(samples=5))
