"""`mip`: the exact best choice (see `puzzle_ray.search.mip`)."""

from __future__ import annotations

from puzzle_ray.search.mip import solve_exactly
from puzzle_ray.search.problem import Problem, Solution
from puzzle_ray.search.searcher import Options


class _Mip:
    name = "mip"

    def solve(self, problem: Problem, options: Options) -> Solution:
        return solve_exactly(problem, time_limit_s=options.time_limit_s)


SEARCHER = _Mip()
