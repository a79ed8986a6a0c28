"""The same variant in every layer: the way to shrink a model without a search."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from puzzle_ray.artifacts import Architecture, LayerChoice, Profile, Scenario, Scores, SearchSpace
from puzzle_ray.errors import ConfigError
from puzzle_ray.search.problem import Choice, Problem, Solution, nearest_miss, verified_solution
from puzzle_ray.search.relaxation import lower_bound
from puzzle_ray.search.searcher import Options
from puzzle_ray.search.tables import predicted_costs


def uniform_choices(problem: Problem) -> list[Choice]:
    """Every choice that all rows can take at once, in ascending order of score. Rows with a single choice keep it. Maybe none."""
    free = [row for row, scores in enumerate(problem.score) if np.isfinite(scores).sum() > 1]
    only = problem.score.argmin(axis=1)
    if not free:
        return [only]
    choices = []
    for label in problem.labels[free[0]]:
        if all(label in problem.labels[row] for row in free):
            choice = only.copy()
            choice[free] = [problem.labels[row].index(label) for row in free]
            choices.append(choice)
    return sorted((choice for choice in choices if np.isfinite(problem.objective(choice))), key=problem.objective)


class _Uniform:
    name = "uniform"

    def solve(self, problem: Problem, options: Options) -> Solution:
        """The uniform choice of least score within the limits. Raises Infeasible, or ConfigError where layers have none in common."""
        started = time.perf_counter()
        problem.check_each_limit()
        choices = uniform_choices(problem)
        if not choices:
            raise ConfigError("search.searcher", f"{self.name}: no choice is allowed in every layer", "use another searcher")
        for choice in choices:
            if not problem.violated(choice):
                bound = lower_bound(problem)
                return verified_solution(problem, choice, bound, "heuristic", time.perf_counter() - started, self.name)
        raise nearest_miss(problem, choices, "no uniform choice comes nearer; another searcher may")


def uniform_architectures(
    space: SearchSpace,
    scores: Scores,
    profile: Profile,
    scenario: Scenario,
    target_runtime_ms: float,
    metric: str = "kl",
) -> list[Architecture]:
    """All architectures with one choice in every layer. The one whose predicted runtime is nearest to the target is first."""
    shared = [c for c in space.layers[0].choices if all(c in layer.choices for layer in space.layers)]
    if not shared:
        raise ConfigError("space", "no choice is offered to every layer", "give the layers a variant in common")
    parent = predicted_costs(space, profile, scenario, [LayerChoice()] * len(space.layers))
    architectures = []
    for choice in shared:
        objective = sum(scores.value(layer, choice, metric) for layer in range(len(space.layers)))
        base = Architecture(
            choices=(choice,) * len(space.layers),
            searcher=SEARCHER.name,
            objective=objective,
            bound=objective,
            status="heuristic",
            solve_s=0.0,
            predicted=parent,
            parent_predicted=parent,
            metric=metric,
            estimated=profile.estimated,
            now=space.now,
        )
        architectures.append(replace(base, predicted=predicted_costs(space, profile, scenario, base.choices)))
    return sorted(architectures, key=lambda a: abs(a.predicted.runtime_ms - target_runtime_ms))


SEARCHER = _Uniform()
