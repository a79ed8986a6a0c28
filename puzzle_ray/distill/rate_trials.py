"""`library.learning_rate: auto`: every variant finds its own learning rate, by a few steps at each of `RATES` from its start.

Between the validation of the start and training there is a trial for each rate. It trains the variant from its start, with a whole
schedule in small, on the first micro-batches of training, which are the same for all rates. Then the start is loaded again. A trial's
loss is the mean training loss of its last quarter: of text that the trial had not seen before. The largest rate is taken whose loss is
within `WITHIN` of the lowest, since a longer training bears a higher rate than a trial does, and training begins as if there had been no
trials. They are positions of the stream as all others, so that they are a function of the text, the seed and the settings, and go on
from a checkpoint to the same bits.

A variant holds no second copy of its weights meanwhile. Trials take `len(RATES) * trial_steps(steps)` optimizer steps beside those of
training. Who has nothing to train tries nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SHARE = 20  # a trial takes this part of the steps of training,
LEAST, MOST = 8, 100  # within these bounds
WARMUP = 0.25  # of a trial: Adam's first steps are as large as the rate whatever the gradient, and a trial has few others
JUDGED = 0.25  # of a trial, at its end
WITHIN = 0.05


@dataclass(frozen=True)
class RateTrial:
    """A trial of one variant. `loss` is None where it was not finite. `taken`: the variant was trained with this rate."""

    layer: int
    kind: str
    variant: str
    rate: float
    loss: float | None
    steps: int
    taken: bool


def trial_steps(total_steps: int) -> int:
    """How many optimizer steps every trial takes."""
    return min(total_steps, MOST, max(LEAST, total_steps // SHARE))


def judged(losses: Sequence[float | None]) -> float | None:
    """A trial's loss, of those of its steps; None where one was not finite."""
    if None in losses:
        return None
    last = [float(loss) for loss in losses[-max(1, round(JUDGED * len(losses))) :] if loss is not None]
    return math.fsum(last) / len(last)


def best_rate(losses: Sequence[float | None]) -> float:
    """The largest whose loss is within `WITHIN` of the lowest, of `RATES` in order; the lowest rate where no trial stayed finite."""
    finite = {rate: loss for rate, loss in zip(RATES, losses, strict=True) if loss is not None}
    most = (1 + WITHIN) * min(finite.values(), default=0.0)
    return max((rate for rate, loss in finite.items() if loss <= most), default=min(RATES))
