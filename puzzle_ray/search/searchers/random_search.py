"""The best of many random choices within the limits: a baseline that uses the scores without a solver."""

from __future__ import annotations

import time

import numpy as np

from puzzle_ray.search.problem import Choice, Floats, Problem, Solution, nearest_miss, verified_solution
from puzzle_ray.search.relaxation import lower_bound
from puzzle_ray.search.searcher import Options


def repaired_at_random(score: Floats, rows: Floats, bounds: Floats, choice: Choice, random: np.random.Generator) -> Choice:
    """While a limit is broken, makes a random one of the changes that break the limits less.

    Where no change does, the choice is returned as it is, with a broken limit.
    """
    layers, choice = np.arange(len(score)), choice.copy()
    while True:
        loads = rows[:, layers, choice].sum(axis=1)
        over = float(np.maximum(loads - bounds, 0.0).sum())
        if over == 0.0:
            return choice
        after = loads[:, None, None] + rows - rows[:, layers, choice][:, :, None]
        left = np.maximum(after - bounds[:, None, None], 0.0).sum(axis=0)
        moves = np.argwhere((left < over - 1e-15) & np.isfinite(score))
        if not len(moves):
            return choice
        row, variant = moves[random.integers(len(moves))]
        choice[row] = variant


def random_choice(score: Floats, rows: Floats, bounds: Floats, random: np.random.Generator) -> Choice:
    """A choice that is uniform at random, then repaired at random."""
    choice = np.array([random.choice(np.flatnonzero(np.isfinite(scores))) for scores in score], dtype=np.intp)
    return repaired_at_random(score, rows, bounds, choice, random)


class _Random:
    name = "random"

    def solve(self, problem: Problem, options: Options) -> Solution:
        """The best of `options.samples` choices, the same for the same seed. Raises Infeasible if none is within the limits."""
        started = time.perf_counter()
        deadline = started + (options.time_limit_s or np.inf)
        problem.check_each_limit()
        random = np.random.default_rng(options.seed)
        rows, bounds = problem.rows()
        best: Choice | None = None
        tries: list[Choice] = []
        for _ in range(options.samples):
            choice = random_choice(problem.score, rows, bounds, random)
            if problem.violated(choice):
                tries.append(choice)
            elif best is None or problem.objective(choice) < problem.objective(best):
                best = choice
            if time.perf_counter() > deadline:
                break
        if best is None:
            raise nearest_miss(problem, tries, f"none of {len(tries)} random choices comes nearer; another searcher may")
        return verified_solution(problem, best, lower_bound(problem), "heuristic", time.perf_counter() - started, self.name)


SEARCHER = _Random()
