"""The baseline that keeps as many parameters as the limits allow (arXiv 2411.19146 v5, appendix on search algorithms)."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from puzzle_ray.errors import ConfigError
from puzzle_ray.search.mip import solve_exactly
from puzzle_ray.search.problem import Limit, Problem, Solution, verified_solution
from puzzle_ray.search.relaxation import lower_bound
from puzzle_ray.search.searcher import Options

PARAMS = "num_params"


class _MaxParams:
    name = "max_params"

    def solve(self, problem: Problem, options: Options) -> Solution:
        """The most parameters within the limits. Of choices with equally many, the one of least score. Raises Infeasible."""
        started = time.perf_counter()
        if PARAMS not in problem.cost_names:
            raise ConfigError("search.searcher", f"{self.name} needs the cost {PARAMS}", "use another searcher")
        params = problem.costs[problem.cost_names.index(PARAMS)]
        finite = np.isfinite(problem.score)
        removed = np.where(finite, np.where(finite, params, 0.0).max(axis=1)[:, None] - params, np.inf)
        largest = solve_exactly(replace(problem, score=removed), time_limit_s=options.time_limit_s)
        as_cost = np.where(finite, removed, 0.0)[None]
        tied = replace(
            problem,
            costs=np.concatenate([problem.costs, as_cost]),
            cost_names=(*problem.cost_names, "removed_params"),
            constants=np.append(problem.constants, 0.0),
            limits=(*problem.limits, Limit("removed_params", len(problem.costs), largest.objective, largest.objective)),
        )
        best = solve_exactly(tied, time_limit_s=options.time_limit_s)
        return verified_solution(
            problem, best.choice, lower_bound(problem), "heuristic", time.perf_counter() - started, self.name
        )


SEARCHER = _MaxParams()
