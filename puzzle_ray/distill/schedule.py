"""The learning rate of both distillations, and the schedule of local distillation: its phases and its early stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from puzzle_ray.distill.rate_trials import RATES, trial_steps
from puzzle_ray.distill.settings import AUTO, EarlyStop, LibraryConfig

Phase = Literal["calibrate", "validate_start", "try", "train", "validate_end"]


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to `peak`, then half a cosine wave down to `final_fraction * peak`. Steps count from 0.

    During warm-up, step `n` has the rate `peak * (n + 1) / ramp_steps`. With `ramp_steps` equal to `warmup_steps` the last step of
    warm-up has the peak; with one more, the first step after warm-up has it.

    `pi_first` is the order of rounding in the cosine's angle: `(pi * steps) / steps_after_warmup` where it is true, and
    `pi * (steps / steps_after_warmup)` where it is false. The two may differ in the last bit. Each distillation keeps its own
    order, so that a run gives the same bits in every version.
    """

    peak: float
    total_steps: int
    warmup_steps: int
    ramp_steps: int
    final_fraction: float
    pi_first: bool

    @classmethod
    def of_bld(cls, peak: float, total_steps: int, warmup_fraction: float) -> LearningRate:
        """For block distillation: at least one step of warm-up, and a tenth of the peak at the end."""
        warmup = max(1, round(total_steps * warmup_fraction))
        return cls(peak, total_steps, warmup, ramp_steps=warmup, final_fraction=0.1, pi_first=False)

    @classmethod
    def of_gkd(cls, peak: float, total_steps: int, warmup_fraction: float, *, falls: bool = True) -> LearningRate:
        """For global knowledge distillation: warm-up may be empty, and the rate falls to 0, or stays at its peak."""
        warmup = int(total_steps * warmup_fraction)
        end = 0.0 if falls else 1.0
        return cls(peak, total_steps, warmup, ramp_steps=warmup + 1, final_fraction=end, pi_first=True)

    def at(self, step: int) -> float:
        """The rate of step 0, 1, ... `total_steps - 1`."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.ramp_steps
        done, after_warmup = step - self.warmup_steps, max(1, self.total_steps - self.warmup_steps)
        angle = math.pi * done / after_warmup if self.pi_first else math.pi * (done / after_warmup)
        return self.peak * (self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(angle)))


def is_flat(losses: Sequence[float], rule: EarlyStop) -> bool:
    """Whether a loss curve has stopped falling.

    Call it after every optimizer step with all losses so far. It looks at whole windows only, so it is false in the middle of one.
    The curve is flat where the lowest mean of the last `patience` windows is above (1 - `min_improvement`) times the lowest mean
    of the windows before.
    """
    if not losses or len(losses) % rule.window:
        return False
    means = [math.fsum(losses[i : i + rule.window]) / rule.window for i in range(0, len(losses), rule.window)]
    before, last = means[: -rule.patience], means[-rule.patience :]
    return bool(before) and min(last) > (1 - rule.min_improvement) * min(before)


RISE = 1.5  # of the mean training loss of a window, over that of the start
RISE_WINDOW = 32  # optimizer steps at most


def has_risen(losses: Sequence[float], attempt_from: int, window: int, start: float) -> bool:
    """Whether the loss of an attempt is above that of the start of training.

    Call it after every optimizer step with all losses so far. `attempt_from` is the step that the attempt began with, and `start`
    the same loss before training, on validation text. It looks at whole windows, and is true where the mean of the last one is above
    `RISE` times `start`.
    """
    done = len(losses) - attempt_from
    return done > 0 and done % window == 0 and math.fsum(losses[-window:]) > RISE * window * start


@dataclass(frozen=True)
class Schedule:
    """How many micro-batches each phase of local distillation takes, and which micro-batch of the data each position reads.

    The phases follow one another: calibrate, validate the start, try learning rates, train, validate the end. A position counts
    micro-batches over all phases, from 0. One optimizer step takes `accumulate` micro-batches of training, one after the other. A rate
    is tried for `trial_steps` of them, 0 where none is tried.
    """

    calibrate: int
    validate: int
    train: int
    accumulate: int = 1
    trial_steps: int = 0

    @classmethod
    def of(cls, config: LibraryConfig) -> Schedule:
        """Numbers of tokens in micro-batches, rounded up; at least one for every phase, and whole optimizer steps for training.

        `config.calibration_tokens` must be a number, see `LibraryConfig.for_parent`.
        """
        assert config.calibration_tokens != "auto", "whose parent is not known"

        def count(tokens: int, each: int) -> int:
            return max(1, math.ceil(tokens / each))

        micro_batch, accumulate = config.micro_batch_tokens, config.gradient_accumulation
        steps = count(config.tokens, micro_batch * accumulate)
        before = count(config.calibration_tokens, micro_batch), count(config.validation_tokens, micro_batch)
        return cls(*before, steps * accumulate, accumulate, trial_steps(steps) if config.learning_rate == AUTO else 0)

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        return self.train // self.accumulate

    @property
    def trials(self) -> int:
        """The micro-batches of all trials of learning rates."""
        return len(RATES) * self.trial_steps * self.accumulate

    @property
    def rise_window(self) -> int:
        """Over how many optimizer steps a rise of the training loss is looked for."""
        return max(4, min(RISE_WINDOW, self.steps // 8))

    @property
    def positions(self) -> int:
        """The number of positions of all phases together."""
        return self.calibrate + 2 * self.validate + self.trials + self.train

    def phase(self, position: int) -> tuple[Phase, int]:
        """The phase of a position, and the position's number within that phase. Raises ValueError past the last phase."""
        lengths: tuple[tuple[Phase, int], ...] = (
            ("calibrate", self.calibrate),
            ("validate_start", self.validate),
            ("try", self.trials),
            ("train", self.train),
            ("validate_end", self.validate),
        )
        for name, length in lengths:
            if position < length:
                return name, position
            position -= length
        raise ValueError(f"position {position} is past the end")

    def data_number(self, position: int) -> int:
        """Which micro-batch of the data stream a position reads.

        Both validations read the same micro-batches. Training does not read them in its first epoch. Every trial of a learning rate
        reads the first ones of training.
        """
        phase, number = self.phase(position)
        if phase.startswith("validate"):
            return number
        if phase == "try":
            number %= self.trial_steps * self.accumulate
        return self.validate + number + (0 if phase == "calibrate" else self.calibrate)
