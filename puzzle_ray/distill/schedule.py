"""When local distillation does what: phases over micro-batches, the learning rate, and the end of a variant that has stopped learning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from puzzle_ray.distill.settings import EarlyStop, LibraryConfig

Phase = Literal["calibrate", "validate_start", "train", "validate_end"]


def warmup_steps(total: int, fraction: float) -> int:
    return max(1, round(total * fraction))


def learning_rate(peak: float, step: int, total: int, warmup_fraction: float) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak. `step` counts from 0."""
    warmup = warmup_steps(total, warmup_fraction)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def is_flat(losses: Sequence[float], rule: EarlyStop) -> bool:
    """Whether a loss curve has stopped falling; asked after every micro-batch, it answers at the end of a window only.

    Flat: the least mean of the last `patience` windows is above (1 - `min_improvement`) times the least mean of those before.
    """
    if not losses or len(losses) % rule.window:
        return False
    means = [math.fsum(losses[i : i + rule.window]) / rule.window for i in range(0, len(losses), rule.window)]
    before, last = means[: -rule.patience], means[-rule.patience :]
    return bool(before) and min(last) > (1 - rule.min_improvement) * min(before)


@dataclass(frozen=True)
class Schedule:
    """How many micro-batches each phase takes, and which data number each position reads."""

    calibrate: int
    validate: int
    train: int

    @classmethod
    def of(cls, config: LibraryConfig) -> Schedule:
        def count(tokens: int) -> int:
            return max(1, math.ceil(tokens / config.micro_batch_tokens))

        return cls(count(config.calibration_tokens), count(config.validation_tokens), count(config.tokens))

    @property
    def positions(self) -> int:
        return self.calibrate + 2 * self.validate + self.train

    def phase(self, position: int) -> tuple[Phase, int]:
        """The phase of a position, and its number within the phase."""
        ends: tuple[tuple[Phase, int], ...] = (
            ("calibrate", self.calibrate),
            ("validate_start", self.validate),
            ("train", self.train),
            ("validate_end", self.validate),
        )
        for name, length in ends:
            if position < length:
                return name, position
            position -= length
        raise ValueError(f"position {position} is past the end")

    def data_number(self, position: int) -> int:
        """Which micro-batch of the stream a position reads: both validations the same ones, not trained on in the first epoch."""
        phase, number = self.phase(position)
        if phase.startswith("validate"):
            return number
        return self.validate + number + (self.calibrate if phase == "train" else 0)
