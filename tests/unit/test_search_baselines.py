"""Greedy, max-params, uniform and random search, by their definitions."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from search_problems import make_problem, random_problem

from puzzle_ray.errors import ConfigError, Infeasible
from puzzle_ray.search.searcher import Options, find_searcher, searchers


def choose(name, problem, **options):
    return searchers()[name].solve(problem, Options(**options))


def test_greedy_serves_the_layers_of_least_mean_damage_first_and_hands_on_what_is_left():
    """Budget 12, share 4 each. Mean scores: row 2 (1), row 0 (2), row 1 (3).

    Row 2 has 4 and takes cost 3 (score 0), row 0 then has 5 and takes 5 (score 0), row 1 has 4 and takes 4 (score 3).
    """
    score = [[0.0, 4.0, 2.0], [0.0, 3.0, 6.0], [0.0, 1.0, 2.0]]
    cost = [[5.0, 1.0, 4.0], [6.0, 4.0, 1.0], [3.0, 2.0, 1.0]]
    solution = choose("greedy", make_problem(score, [cost], [12.0]))
    assert solution.choice.tolist() == [0, 1, 0]
    assert solution.objective == 3.0


def test_greedy_says_that_another_searcher_may_reach_more():
    """Row 0 has 2.5 and takes the choice of cost 2; row 1 then has 3, and all of its choices cost 4."""
    score = [[0.0, 1.0], [0.0, 9.0]]
    costs = [[[2.0, 0.0], [4.0, 4.0]]]
    problem = make_problem(score, costs, [5.0])
    with pytest.raises(Infeasible, match="another searcher may"):
        choose("greedy", problem)
    assert choose("mip", problem).choice.tolist() == [1, 0]


def params_problem(seed):
    problem = random_problem(seed, 5, 5, 2, 0.5)
    params = np.random.default_rng(seed).integers(0, 6, problem.score.shape).astype(float)
    return replace(
        problem,
        costs=np.concatenate([problem.costs, params[None]]),
        cost_names=(*problem.cost_names, "num_params"),
        constants=np.zeros(3),
    )


@pytest.mark.parametrize("seed", range(5))
def test_max_params_keeps_the_most_and_breaks_ties_by_score(seed):
    problem = params_problem(seed)
    within = [c for c in map(np.array, itertools.product(range(5), repeat=5)) if not problem.violated(c)]
    best = min(within, key=lambda c: (-problem.spent(c)[2], problem.objective(c)))
    solution = choose("max_params", problem)
    assert problem.spent(solution.choice)[2] == problem.spent(best)[2]
    assert solution.objective == pytest.approx(problem.objective(best))


def test_max_params_needs_a_count_of_parameters():
    with pytest.raises(ConfigError, match="num_params"):
        choose("max_params", random_problem(0, 3, 3, 1, 0.5))


def test_uniform_takes_the_best_choice_that_all_layers_can_share():
    score = [[0.0, 1.0, 5.0], [0.0, 2.0, 5.0]]
    problem = make_problem(score, [[[9.0, 4.0, 1.0], [9.0, 4.0, 1.0]]], [10.0])
    assert choose("uniform", problem).choice.tolist() == [1, 1]


def test_uniform_leaves_fixed_layers_alone():
    score = [[0.0, np.inf, np.inf], [0.0, 2.0, 5.0], [0.0, 2.0, 5.0]]
    costs = [[[4.0, 0.0, 0.0], [9.0, 4.0, 1.0], [9.0, 4.0, 1.0]]]
    assert choose("uniform", make_problem(score, costs, [12.0])).choice.tolist() == [0, 1, 1]


def test_uniform_takes_no_choice_that_is_forbidden_or_not_shared():
    problem = make_problem([[0.0, np.inf, 1.0], [np.inf, 0.0, 1.0]], [[[5.0, 5.0, 30.0]] * 2], [20.0])
    with pytest.raises(Infeasible, match="no uniform choice comes nearer"):  # both could have the third, which costs too much
        choose("uniform", problem)
    unlike = replace(problem, labels=(("a", "b", "c"), ("d", "e", "f")))
    with pytest.raises(ConfigError, match="no choice is allowed in every layer"):
        choose("uniform", unlike)


def test_random_search_repeats_itself_and_does_not_get_worse_with_more_samples():
    problem = random_problem(7, 20, 8, 2, 0.3)
    few, again, many = (choose("random", problem, seed=3, samples=n) for n in (20, 20, 200))
    assert few.choice.tolist() == again.choice.tolist()
    assert many.objective <= few.objective


def depth_problem(bound, weights=(1, 1, 1)):
    """Three rows: the whole block, half of it, none; dropping row 1 does least damage, then row 2 by layer."""
    score = [[0.0, 1.0, 6.0], [0.0, 0.1, 2.0], [0.0, 0.2, 3.0]]
    problem = make_problem(score, [[[4.0, 2.0, 0.0]] * 3], [bound], weights)
    return replace(problem, labels=(("parent + parent", "parent + noop", "noop + noop"),) * 3)


def test_depth_drops_whole_layers_of_least_influence_until_the_limit_holds():
    assert choose("depth", depth_problem(12.0)).choice.tolist() == [0, 0, 0]
    assert choose("depth", depth_problem(8.0)).choice.tolist() == [0, 2, 0]
    assert choose("depth", depth_problem(7.0)).choice.tolist() == [0, 2, 2]
    assert choose("depth", depth_problem(8.0, weights=(4, 1, 2))).choice.tolist() == [2, 0, 0]  # by layer: 1.5, 2, 1.5


def test_depth_drops_no_layer_where_that_is_forbidden():
    problem = depth_problem(4.0)
    score = problem.score.copy()
    score[1, 2] = np.inf
    assert choose("depth", replace(problem, score=score)).choice.tolist() == [2, 0, 2]
    with pytest.raises(Infeasible, match="dropping layers"):
        choose("depth", replace(depth_problem(2.0), score=score))


def test_depth_needs_layers_that_can_be_dropped():
    with pytest.raises(ConfigError, match="noop attention and noop ffn"):
        choose("depth", random_problem(0, 3, 3, 1, 0.5))


@pytest.mark.parametrize("name", ["evolutionary", "reinforce"])
def test_learning_searchers_repeat_themselves_and_beat_random_search(name):
    problem = random_problem(7, 20, 8, 2, 0.3)
    found, again = (choose(name, problem, seed=3, samples=200) for _ in range(2))
    assert found.choice.tolist() == again.choice.tolist()
    assert found.objective < choose("random", problem, seed=3, samples=800).objective


@pytest.mark.parametrize("name", ["evolutionary", "reinforce"])
def test_learning_searchers_find_the_best_of_a_small_problem(name):
    problem = random_problem(2, 5, 4, 1, 0.5)
    assert choose(name, problem, samples=400).objective == pytest.approx(choose("mip", problem).objective)


def test_an_unknown_searcher_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'greedy'"):
        find_searcher("gredy")


def test_a_searcher_may_live_elsewhere():
    assert find_searcher("puzzle_ray.search.searchers.greedy:SEARCHER").name == "greedy"
    with pytest.raises(ConfigError, match="cannot be imported"):
        find_searcher("puzzle_ray.search.searchers.nowhere:SEARCHER")


def test_listing_the_searchers_loads_no_torch():
    code = (
        "import sys; from puzzle_ray.search.searcher import searchers; print('reinforce' in searchers(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_reinforce_leaves_torchs_threads_as_they_were():
    before = torch.get_num_threads()
    choose("reinforce", random_problem(2, 5, 4, 1, 0.5), samples=8)
    assert torch.get_num_threads() == before
