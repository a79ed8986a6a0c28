"""The greedy baseline of the Puzzle paper (arXiv 2411.19146 v5, appendix on search algorithms)."""

from __future__ import annotations

import time

import numpy as np

from puzzle_ray.search.problem import Choice, Problem, Solution, nearest_miss, verified_solution
from puzzle_ray.search.relaxation import lower_bound
from puzzle_ray.search.searcher import Options


def greedy_choice(problem: Problem) -> Choice:
    """Every layer has an equal share of each budget. What it does not spend goes to the next layer.

    Layers are decided in ascending order of the mean score of their variants. Each takes the variant of lowest score that fits its
    share. Where no variant fits, it takes the one that exceeds its share least, and the next layer has that much less.
    """
    score, (rows, bounds) = problem.score, problem.rows()
    share = bounds / problem.weights.sum()
    finite = np.isfinite(score)
    mean = np.where(finite, score, 0.0).sum(axis=1) / finite.sum(axis=1) / problem.weights
    left = np.zeros_like(bounds)
    choice = np.zeros(len(score), dtype=np.intp)
    for row in np.argsort(mean, kind="stable"):
        budget = left + share * problem.weights[row]
        over = np.maximum(rows[:, row] - budget[:, None], 0.0).sum(axis=0)
        over[~finite[row]] = np.inf
        choice[row] = np.lexsort((score[row], over))[0]
        left = budget - rows[:, row, choice[row]]
    return choice


class _Greedy:
    name = "greedy"

    def solve(self, problem: Problem, options: Options) -> Solution:
        """The greedy choice. Raises Infeasible where it breaks a limit, though another choice might not."""
        started = time.perf_counter()
        problem.check_each_limit()
        choice = greedy_choice(problem)
        if problem.violated(choice):
            raise nearest_miss(problem, [choice], "the greedy search reaches no more; another searcher may")
        return verified_solution(problem, choice, lower_bound(problem), "heuristic", time.perf_counter() - started, self.name)


SEARCHER = _Greedy()
