"""A child whose layers are all alike: how narrow they have to be for a speed, by a profile."""

from __future__ import annotations

from typing import Any

import numpy as np

from puzzle_ray.artifacts import PARENT, LayerChoice, Profile, Scenario, SearchSpace
from puzzle_ray.search.tables import predicted_costs


def uniform_choice(
    space: SearchSpace, costs: Profile, scenario: Scenario, intermediate_size: int, multiple_of: int, speed: float
) -> LayerChoice | None:  # fmt: skip
    """The mildest narrowing of every layer alike that reaches a speed: fewer KV heads only where the FFN alone, at a tenth of its width,
    would not do. The time of a width is interpolated between those profiled. None where no narrowing is enough."""
    layer_type, depth, size = space.layers[0].layer_type, len(space.layers), scenario.batch_size

    def runtime_ms(kind: Any, variant: str) -> float:
        row = costs.row(layer_type, kind, variant, size)
        return row.prefill_ms + (scenario.output_tokens - 1) * row.decode_ms

    parent = predicted_costs(space, costs, scenario, [LayerChoice()] * depth).runtime_ms
    saving = (parent - parent / speed) / depth
    names = [v for v in space.layers[0].ffn if v == PARENT or v.startswith("ffn:")]
    widths = sorted((intermediate_size if v == PARENT else int(v[4:]), runtime_ms("ffn", v)) for v in names)
    for attention in (PARENT, *(v for v in space.layers[0].attention if v.startswith("gqa:"))):
        target = runtime_ms("ffn", PARENT) - saving + runtime_ms("attention", PARENT) - runtime_ms("attention", attention)
        if target >= widths[0][1]:
            width = float(np.interp(target, np.maximum.accumulate([ms for _, ms in widths]), [w for w, _ in widths]))
            return LayerChoice(attention, f"ffn:{max(multiple_of, int(width) // multiple_of * multiple_of)}")
    return None
