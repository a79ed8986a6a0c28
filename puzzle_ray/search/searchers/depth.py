"""Drops whole layers, those of least influence first, until the limits hold (like ShortGPT, arXiv 2403.03853).

The influence of a layer is the replace-one score of dropping it. ShortGPT uses a cosine distance instead.
"""

from __future__ import annotations

import time

import numpy as np

from puzzle_ray.artifacts import PARENT, LayerChoice
from puzzle_ray.errors import ConfigError
from puzzle_ray.search.problem import Choice, Problem, Solution, nearest_miss, verified_solution
from puzzle_ray.search.relaxation import lower_bound
from puzzle_ray.search.searcher import Options

DROPPED = LayerChoice("noop", "noop").label
KEPT = LayerChoice(PARENT, PARENT).label


def depth_choices(problem: Problem) -> list[Choice]:
    """The whole parent, then choices with one more row dropped each. A row without the parent's choice keeps its choice of least score."""
    kept = [x.index(KEPT) if KEPT in x else int(s.argmin()) for x, s in zip(problem.labels, problem.score, strict=True)]
    dropped = {row: labels.index(DROPPED) for row, labels in enumerate(problem.labels) if DROPPED in labels}
    dropped = {row: v for row, v in dropped.items() if np.isfinite(problem.score[row, v])}  # `search.without` may forbid it
    choices = [np.array(kept, dtype=np.intp)]
    for row in sorted(dropped, key=lambda row: problem.score[row, dropped[row]] / problem.weights[row]):
        choices.append(choices[-1].copy())
        choices[-1][row] = dropped[row]
    return choices


class _Depth:
    name = "depth"

    def solve(self, problem: Problem, options: Options) -> Solution:
        """The choice with the fewest dropped layers within the limits. Raises Infeasible, or ConfigError where no layer can be dropped."""
        started = time.perf_counter()
        problem.check_each_limit()
        choices = depth_choices(problem)
        if len(choices) == 1:
            raise ConfigError("search.searcher", f"{self.name} needs noop attention and noop ffn", "add them to the space")
        for choice in choices:
            if not problem.violated(choice):
                return verified_solution(
                    problem, choice, lower_bound(problem), "heuristic", time.perf_counter() - started, self.name
                )
        raise nearest_miss(problem, choices, "dropping layers in order of influence reaches no more; another searcher may")


SEARCHER = _Depth()
