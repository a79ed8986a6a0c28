"""Five layers to pick from, and the true KL of their children: more than the sum of scores where neighbours lose their attention."""

from __future__ import annotations

import itertools

import numpy as np

from puzzle_ray.artifacts import (
    FIXED,
    LayerSpace,
    Measured,
    Profile,
    ProfileRow,
    Scenario,
    ScoreRow,
    Scores,
    SearchSpace,
)
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.tables import Tables

SCENARIO = Scenario(batch_size=1, input_tokens=8, output_tokens=1)
COST = {"parent": 4.0, "gqa:1": 2.0, "noop": 0.0}
LAYERS = 5
SPACE = SearchSpace((LayerSpace(tuple(COST), ("parent", "noop")),) * LAYERS)
LIMITS = Limits(latency_ms=20.0)  # of the parent's 40


def profile_row(kind, variant, ms):
    shape = "" if kind == FIXED else "full_attention"
    return ProfileRow(shape, kind, variant, 1, 8, 1, ms, 0.0, 0.0, 0.0, 100, int(ms), int(10 * ms))


PROFILE = Profile(
    (
        *(profile_row("attention", name, ms) for name, ms in COST.items()),
        profile_row("ffn", "parent", 4.0),
        profile_row("ffn", "noop", 0.0),
        profile_row(FIXED, FIXED, 0.0),
    ),
    "torch",
    "1",
    "cpu",
    "float32",
)


def make_scores() -> Scores:
    rng = np.random.default_rng(3)
    rows = []
    for layer in range(LAYERS):
        for choice in SPACE.layers[layer].choices[1:]:
            saved = 8 - COST[choice.attention] - (4 if choice.ffn == "parent" else 0)
            rows.append(ScoreRow(layer, choice.attention, choice.ffn, "kl", float(saved * rng.lognormal(0, 0.5)), 0.0, 10))
    return Scores(tuple(rows), "block")


SCORES = make_scores()
TABLES = Tables.of(SPACE, SCORES, PROFILE, SCENARIO, "kl", LIMITS)


def true_kl(choices) -> float:
    """The sum of scores, and more for neighbours that both lose their attention: what the scores cannot know."""
    total = sum(SCORES.value(layer, choice, "kl") for layer, choice in enumerate(choices))
    both = sum(a.attention == b.attention == "noop" for a, b in itertools.pairwise(choices))
    return total + 5.0 * both


class Meter:
    """Knows the truth, and what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, children):
        self.asked += children
        return [Measured(true_kl(c), 0.0, 0.0, 1.0, 10) for c in children]


def cost(choices) -> float:
    return sum(COST[c.attention] + (4.0 if c.ffn == "parent" else 0.0) for c in choices)
