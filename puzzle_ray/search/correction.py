"""What measured children say of those that are not measured: sums of scores, corrected block by block.

A sum of replace-one scores assumes that damages add up. Two blocks can do more together, as two linear layers in a row, or less. A few
measured children do not tell every pair apart, but they tell which blocks were in the children that came out worse than their sums.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from puzzle_ray.artifacts import Choices
from puzzle_ray.errors import ConfigError
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.problem import Floats, Problem
from puzzle_ray.search.searcher import Options
from puzzle_ray.search.tables import Answer, Tables


@dataclass(frozen=True, eq=False)
class Correction:
    """What the score of every block is multiplied by to predict KLs of whole children. `factors` is [R, V], as a problem's scores."""

    factors: Floats

    @classmethod
    def fitted(cls, measured: Sequence[tuple[Answer, float]]) -> Correction | None:
        """By the KLs of measured answers; None where no KL is a number, or no sum of scores is above 0.

        A child's KL over its sum of scores is taken for a common ratio, and the mean of its blocks' own parts, weighted by their shares
        of the sum, and a part of the child alone. Blocks' parts and children's parts are as large as each other, and 0 on average.
        So what no child says anything about gets the common ratio.
        """
        known = [(a, kl / a.table.problem.objective(a.choice)) for a, kl in measured if _can_tell(a, kl)]
        if not known:
            return None
        ratios = np.array([ratio for _, ratio in known])
        shares = np.zeros((len(known), *known[0][0].table.problem.score.shape))  # [N, R, V]
        for share, (answer, _) in zip(shares, known, strict=True):
            rows = np.arange(len(answer.choice))
            score = answer.table.problem.score[rows, answer.choice]
            share[rows, answer.choice] = score / score.sum()
        covariance = np.einsum("irv,jrv->ij", shares, shares) + np.eye(len(known))
        precision = np.linalg.inv(covariance)
        ratio = (precision @ ratios).sum() / precision.sum()
        own = np.einsum("i,irv->rv", precision @ (ratios - ratio), shares)
        return cls(np.maximum(ratio + own, 0.0))

    def scores(self, problem: Problem) -> Floats:
        """The corrected scores. They add up to a predicted KL."""
        exists = np.isfinite(problem.score)
        return np.where(exists, np.where(exists, problem.score, 0.0) * self.factors, np.inf)

    def kl(self, answer: Answer) -> float:
        """The predicted KL of an answer."""
        rows = np.arange(len(answer.choice))
        return math.fsum(self.scores(answer.table.problem)[rows, answer.choice])


def _can_tell(answer: Answer, kl: float) -> bool:
    return math.isfinite(kl) and answer.table.problem.objective(answer.choice) > 0


def best_unmeasured(
    tables: Tables, limits: Limits, searcher: str, options: Options, correction: Correction, known: Collection[Choices]
) -> Answer:
    """The searcher's answer to the corrected scores that is not among `known`. Its objective is the sum of the scores themselves.

    Raises Infeasible where there is no other answer, OutOfTime, or ConfigError where the searcher gives answers again.
    """
    corrected = tuple(replace(t, problem=replace(t.problem, score=correction.scores(t.problem))) for t in tables.tables)
    answers = replace(tables, tables=corrected).answers(limits, searcher, 1, options)
    new = (answer for answer in islice(answers, len(known) + 1) if answer.architecture.choices not in known)
    found = next(new, None)
    if found is None:
        problem = f"{searcher!r} gave {len(known) + 1} answers, of which none is new, though each is to differ from all before it"
        raise ConfigError("search.searcher", problem, "let it keep to all limits of the problem")
    plain = next(t for t in tables.within(limits) if t.scenario == found.table.scenario)
    objective = plain.problem.objective(found.choice)
    return Answer(replace(found.architecture, objective=objective), plain, found.choice)
