"""`gkd.learning_rate: auto`: the rate is chosen by a short range test on the child itself.

Every trial trains the child from its start for a few steps, with a whole schedule in small (a quarter of warm-up, then down to 0), on the
first micro-batches of the training text. Then it measures the KL on the held-out text that training is watched on. The test begins at
the rate `RATES[FIRST]` and goes up for as long as the KL falls, unless that rate made the child worse than it was. Where going up does
not help, it goes down as long as the KL falls. The largest rate is taken whose KL is within `WITHIN` of the best: a longer training bears
a higher rate than a trial does. The test is a function of what training is a function of, and a resumed run does not repeat it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST = RATES.index(3e-4)
SHARE = 20  # a trial takes this part of the steps of the whole training,
LEAST, MOST = 20, 100  # within these bounds
WARMUP = 0.25  # of a trial: Adam's first steps are as large as the rate whatever the gradient, and a trial has few others
WITHIN = 0.05
MOST_TRIALS = 2 + FIRST  # the first rate, one above it that is no better, and all below


@dataclass(frozen=True)
class Trial:
    """The held-out KL after a trial's steps, in nats per token; infinite where its loss was no longer finite."""

    rate: float
    kl: float
    steps: int


def trial_steps(total_steps: int) -> int:
    """How many steps every trial takes."""
    return min(total_steps, MOST, max(LEAST, total_steps // SHARE))


def trial_facts(trials: Sequence[Trial]) -> list[dict[str, float | None]]:
    """The trials as an artifact's facts have them: a KL that is not finite is None."""
    return [{"rate": t.rate, "kl": t.kl if math.isfinite(t.kl) else None, "steps": t.steps} for t in trials]


def best_rate(trials: Sequence[Trial]) -> float:
    """The largest rate whose KL is within `WITHIN` of the lowest; the lowest rate of all where no trial stayed finite."""
    lowest = min(trial.kl for trial in trials)
    if not math.isfinite(lowest):
        return min(trial.rate for trial in trials)
    return max(trial.rate for trial in trials if trial.kl <= (1 + WITHIN) * lowest)


def range_test(try_rate: Callable[[float], Trial], start_kl: float) -> list[Trial]:
    """The trials in the order in which they were made. `start_kl` is the held-out KL before any training."""
    trials = [try_rate(RATES[FIRST])]
    for direction in (1, -1) if trials[0].kl < start_kl else (-1,):
        last, index = trials[0], FIRST + direction
        while 0 <= index < len(RATES):
            trials.append(try_rate(RATES[index]))
            if not trials[-1].kl < last.kl and (direction > 0 or math.isfinite(last.kl)):
                break
            last, index = trials[-1], index + direction
        if min(trials, key=lambda trial: trial.kl) is not trials[0]:
            break
    return trials
