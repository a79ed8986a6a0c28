"""A correction of the scores, fitted to measured children, so that fewer children need to be measured.

The sum of replace-one scores takes damages of layers as if they added up. In a whole child a layer's damage is larger or smaller than
alone, since others are replaced too. So every layer gets a factor: KL of a child = sum over layers of factor x score. The factors are
fitted to the children that were measured, by least squares of the relative error, drawn towards one common factor. The search is solved
again with the corrected scores, its answer is measured and joins the others. That ends where the answer was measured before, where its
KL is as predicted, or after a number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from puzzle_ray.search.problem import Floats

RIDGE = 0.1  # how strongly factors are drawn together, as a share of what the measured children say of a layer on average
LEAST = 0.1  # a factor, as a share of the common one: more damage never counts as less


@dataclass(frozen=True, eq=False)
class Correction:
    """A factor for every row of a problem."""

    factors: Floats

    def of(self, score: Floats) -> Floats:
        """Corrected scores `[R, V]`."""
        return score * self.factors[:, None]

    def predicted(self, damages: Floats) -> float:
        """The KL of a child whose rows have these scores, `[R]`."""
        return float(self.factors @ damages)


def fitted_correction(damages: Sequence[Floats], kls: Sequence[float]) -> Correction | None:
    """The correction for measured children: the scores of the choices of each, `[R]`, and its KL. None where none of them says anything."""
    pairs = [(np.asarray(d, dtype=float), kl) for d, kl in zip(damages, kls, strict=True) if kl > 0 and np.sum(d) > 0]
    if not pairs:
        return None
    features = np.array([d / kl for d, kl in pairs])  # [K, R]; times the factors they are to be 1
    common = float(np.exp(np.mean([np.log(kl / d.sum()) for d, kl in pairs])))
    gram = features.T @ features
    ridge = RIDGE * np.trace(gram) / len(gram)
    factors = np.linalg.solve(gram + ridge * np.eye(len(gram)), features.T @ np.ones(len(pairs)) + ridge * common)
    return Correction(np.maximum(factors, LEAST * common))


def corrected(score: Floats, correction: Correction) -> Floats:
    """Scores that are corrected, where they are finite."""
    return np.where(np.isfinite(score), correction.of(np.where(np.isfinite(score), score, 0.0)), score)
