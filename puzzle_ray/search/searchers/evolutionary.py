"""Evolution: two parents are crossed, and the child is mutated and repaired at random where it breaks a limit.

Each parent is the better one of two random members of the population.
"""

from __future__ import annotations

import time

import numpy as np

from puzzle_ray.search.problem import Choice, Problem, Solution, nearest_miss, verified_solution
from puzzle_ray.search.relaxation import lower_bound
from puzzle_ray.search.searcher import Options
from puzzle_ray.search.searchers.random_search import random_choice, repaired_at_random

POPULATION = 32
OFFSPRING_PER_SAMPLE = 4  # children cost less than fresh random choices, which need more repair


class _Population:
    """The best distinct choices so far, in ascending order of objective."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.members: list[tuple[float, Choice]] = []

    def add(self, choice: Choice) -> bool:
        """Adds a choice. Returns False where it breaks a limit."""
        if self.problem.violated(choice):
            return False
        if not any((choice == member).all() for _, member in self.members):
            self.members.append((self.problem.objective(choice), choice))
            self.members.sort(key=lambda member: member[0])
            del self.members[POPULATION:]
        return True

    def parent(self, random: np.random.Generator) -> Choice:
        """The better one of two random members: members are in order, so it has the lower index."""
        return self.members[random.integers(len(self.members), size=2).min()][1]


def offspring(problem: Problem, population: _Population, random: np.random.Generator) -> Choice:
    """Uniform crossover of two parents; about one row mutates to another of its choices."""
    rows = len(problem.score)
    child = np.where(random.random(rows) < 0.5, population.parent(random), population.parent(random))
    for row in np.flatnonzero(random.random(rows) < 1.5 / rows):
        child[row] = random.choice(np.flatnonzero(np.isfinite(problem.score[row])))
    return child


class _Evolutionary:
    name = "evolutionary"

    def solve(self, problem: Problem, options: Options) -> Solution:
        """The best of 4 x `options.samples` children, the same for the same seed. Raises Infeasible if none is within the limits."""
        started = time.perf_counter()
        deadline = started + (options.time_limit_s or np.inf)
        problem.check_each_limit()
        random = np.random.default_rng(options.seed)
        rows, bounds = problem.rows()
        population, tries = _Population(problem), []
        for number in range(POPULATION + OFFSPRING_PER_SAMPLE * options.samples):
            if number < POPULATION or not population.members:
                choice = random_choice(problem.score, rows, bounds, random)
            else:
                child = offspring(problem, population, random)
                choice = repaired_at_random(problem.score, rows, bounds, child, random)
            if not population.add(choice) and not population.members:
                tries.append(choice)
            if time.perf_counter() > deadline:
                break
        if not population.members:
            raise nearest_miss(problem, tries, f"none of {len(tries)} choices comes nearer; another searcher may")
        best = population.members[0][1]
        return verified_solution(problem, best, lower_bound(problem), "heuristic", time.perf_counter() - started, self.name)


SEARCHER = _Evolutionary()
