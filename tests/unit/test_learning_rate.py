"""One learning rate for both distillations: each gives the bits of the formula it was first written as."""

import itertools
import math

import pytest

from puzzle_ray.distill.schedule import LearningRate

TOTALS = (1, 2, 3, 7, 10, 64, 100, 489, 1000)
FRACTIONS = (0.0, 0.01, 0.05, 0.1, 0.2, 1 / 3, 0.5, 0.9, 0.999)
PEAKS = (1.0, 1e-3, 3e-4, 7.3e-5)


def bld_rate(peak: float, step: int, total: int, warmup_fraction: float) -> float:
    warmup = max(1, round(total * warmup_fraction))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def gkd_rate(peak: float, step: int, total: int, warmup_fraction: float) -> float:
    warmup = int(warmup_fraction * total)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@pytest.mark.parametrize(("of", "formula"), [(LearningRate.of_bld, bld_rate), (LearningRate.of_gkd, gkd_rate)])
def test_every_rate_is_that_of_the_formula_bit_for_bit(of, formula):
    for total, fraction, peak in itertools.product(TOTALS, FRACTIONS, PEAKS):
        rate = of(peak, total, fraction)
        for step in range(total):
            assert rate.at(step) == formula(peak, step, total, fraction), (total, fraction, peak, step)
