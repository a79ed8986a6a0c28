"""A small space of four layers with scores and a profile, made by rule."""

from __future__ import annotations

import numpy as np

from puzzle_ray.artifacts import FIXED, LayerSpace, Profile, ProfileRow, Scenario, ScoreRow, Scores, SearchSpace

SCENARIO = Scenario(batch_size=4, input_tokens=30, output_tokens=11)
ATTENTION = {"parent": 1.0, "gqa:2": 0.7, "noop": 0.0}
FFN = {"parent": 1.0, "ffn:64": 0.5}
LAYERS = 4
SPACE = SearchSpace((LayerSpace(tuple(ATTENTION), tuple(FFN)),) * LAYERS)


def profile_row(subblock, variant, size, batch_size):
    """Costs proportional to a size; a batch of 8 is a little less than twice as slow as one of 4."""
    slower = {4: 1.0, 8: 1.8}[batch_size]
    kv = int(64 * size) if subblock == "attention" else 0
    return ProfileRow(
        layer_type="" if subblock == FIXED else "full_attention",
        subblock=subblock,
        variant=variant,
        batch_size=batch_size,
        input_tokens=SCENARIO.input_tokens,
        output_tokens=SCENARIO.output_tokens,
        prefill_ms=8.0 * size * slower,
        decode_ms=0.5 * size * slower,
        prefill_spread_ms=0.0,
        decode_spread_ms=0.0,
        weight_bytes=int(2**20 * size),
        kv_bytes_per_token=kv,
        num_params=int(500 * size),
    )


def make_profile(*batch_sizes) -> Profile:
    rows = []
    for batch_size in batch_sizes:
        rows += [profile_row("attention", name, size, batch_size) for name, size in ATTENTION.items()]
        rows += [profile_row("ffn", name, 2 * size, batch_size) for name, size in FFN.items()]
        rows.append(profile_row(FIXED, FIXED, 0.5, batch_size))
    return Profile(tuple(rows), "torch", "1", "cpu", "float32")


PROFILE = make_profile(4)


def make_scores(seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    rows = []
    for layer in range(LAYERS):
        for choice in SPACE.layers[layer].choices[1:]:
            saved = 3 - ATTENTION[choice.attention] - 2 * FFN[choice.ffn]
            value = float(saved * rng.lognormal(0, 0.7))
            rows.append(ScoreRow(layer, choice.attention, choice.ffn, "kl", value, 0.0, 100))
    return Scores(tuple(rows), "block")


SCORES = make_scores()
