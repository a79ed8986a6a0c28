"""Takes whatever costs least of the first cost that is limited."""

import time

import numpy as np

from puzzle_ray.search.problem import verified_solution
from puzzle_ray.search.relaxation import lower_bound


class Cheapest:
    name = "cheapest"

    def solve(self, problem, options):
        started = time.perf_counter()
        problem.check_each_limit()
        choice = np.where(np.isfinite(problem.score), problem.costs[problem.limits[0].cost], np.inf).argmin(axis=1)
        return verified_solution(problem, choice, lower_bound(problem), "heuristic", time.perf_counter() - started, self.name)


SEARCHER = Cheapest()
