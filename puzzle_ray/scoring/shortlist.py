"""Which candidates deserve an exact score, and what stands in for it where they do not get one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from puzzle_ray.artifacts import KINDS, LayerChoice, LayerSpace, ScoreRow, SearchSpace, SubblockKind
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.models.blocks import swapped
from puzzle_ray.profiling.memory import subblock_weights
from puzzle_ray.scoring.fisher import Estimates, key_of
from puzzle_ray.scoring.items import Replacement
from puzzle_ray.scoring.metrics import mean, standard_error
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.surgery.projections import AttentionProjections
from puzzle_ray.surgery.subblocks import LinearAttention, NoopAttention

METRIC = "fisher"
STEEPEST = 4.0  # exponent: a fit to estimates that hardly differ finds any
Footprint = tuple[int, int]  # parameters, width of keys and values per token
Footprints = Mapping[tuple[LayerSpace, SubblockKind, str], Footprint]


def footprints(space: SearchSpace, descriptor: Descriptor, config: Any) -> Footprints:
    """What every subblock variant weighs; nothing is allocated."""
    with torch.device("meta"):
        model = getattr(transformers, descriptor.model_class)._from_config(config)
        found: dict[tuple[LayerSpace, SubblockKind, str], Footprint] = {}
        for index, layer_space in enumerate(space.layers):
            parent = model.get_submodule(f"{descriptor.layers}.{index}")
            for kind in KINDS:
                for name in layer_space.variants(kind):
                    if (layer_space, kind, name) not in found:
                        layer = swapped(parent, LayerChoice(**{kind: name}), descriptor, config)
                        found[layer_space, kind, name] = _size(layer, kind, descriptor)
    return found


def _size(layer: nn.Module, kind: SubblockKind, descriptor: Descriptor) -> Footprint:
    params = subblock_weights(layer, kind, descriptor).num_params
    without = isinstance(layer.get_submodule(descriptor.attention), (NoopAttention, LinearAttention))
    if kind == "ffn" or without:
        return params, 0
    return params, AttentionProjections.of(layer, descriptor).key.weight_OI.shape[0]


def choose(
    items: Sequence[Replacement], values: Mapping[Replacement, float], weigh: Mapping[Replacement, Footprint], keep: float
) -> tuple[Replacement, ...]:
    """Per layer, `keep` of the items, rounded up: first those that no other beats in estimate and both sizes at once, by
    estimate; then the beaten ones, by estimate. In the order of `items`."""

    def beaten(item: Replacement, rivals: Sequence[Replacement]) -> bool:
        own = (values[item], *weigh[item])
        others = ((values[rival], *weigh[rival]) for rival in rivals)
        return any(other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in others)

    chosen: set[Replacement] = set()
    for layer in sorted({item.layer for item in items}):
        rivals = [item for item in items if item.layer == layer]
        ordered = sorted(rivals, key=lambda item: (beaten(item, rivals), values[item]))
        chosen.update(ordered[: math.ceil(keep * len(ordered))])
    return tuple(item for item in items if item in chosen)


@dataclass(frozen=True)
class Calibration:
    """exact = factor * estimate ** exponent, fitted in logarithms; `spread` is the standard deviation of what it misses there."""

    factor: float = 1.0
    exponent: float = 1.0
    spread: float = 0.0

    @classmethod
    def fit(cls, estimates: Sequence[float], exact: Sequence[float]) -> Calibration:
        """Increasing always. Pairs that are not positive say nothing; with fewer than three others, a factor alone is fitted."""
        pairs = [(math.log(x), math.log(y)) for x, y in zip(estimates, exact, strict=True) if x > 0 and y > 0]
        if not pairs:
            return cls()
        x0, y0 = mean([x for x, _ in pairs]), mean([y for _, y in pairs])
        variance = sum((x - x0) ** 2 for x, _ in pairs)
        slope = sum((x - x0) * (y - y0) for x, y in pairs) / variance if len(pairs) > 2 and variance > 0 else 1.0
        slope = min(slope, STEEPEST) if slope > 0 else 1.0
        misses = [y - y0 - slope * (x - x0) for x, y in pairs]
        spread = (sum(m * m for m in misses) / max(1, len(pairs) - 2)) ** 0.5
        return cls(math.exp(y0 - slope * x0), slope, spread)

    def __call__(self, estimate: float) -> float:
        return self.factor * max(estimate, 0.0) ** self.exponent


@dataclass(frozen=True)
class Shortlist:
    """`exact`: the items to score in full. `estimates`: of all items, one value per sequence."""

    items: tuple[Replacement, ...]
    exact: tuple[Replacement, ...]
    estimates: Mapping[Replacement, tuple[float, ...]]
    tokens: int
    metric: str

    @classmethod
    def of(
        cls,
        items: Sequence[Replacement],
        found: Estimates,
        tokens: int,
        weights: Footprints,
        space: SearchSpace,
        config: ScoringConfig,
    ) -> Shortlist:
        """`found`: the estimates read back from the store, over `tokens` tokens."""
        estimates = {item: tuple(found[key_of(item)]) for item in items}

        def weigh(item: Replacement) -> Footprint:
            layer = space.layers[item.layer]
            parts = [weights[layer, kind, item.choice.variant(kind)] for kind in KINDS]
            return sum(p for p, _ in parts), sum(w for _, w in parts)

        means = {item: mean(values) for item, values in estimates.items()}
        exact = choose(items, means, {item: weigh(item) for item in items}, config.shortlist_keep)
        return cls(tuple(items), exact, estimates, tokens, config.metric)

    def rows(self, exact_rows: Sequence[ScoreRow]) -> list[ScoreRow]:
        """Metric `fisher` for every item; and for those not scored exactly, `metric` from their estimate, marked by `tokens` 0.

        The stderr of such a row is the calibration's spread: how far estimates were from exact scores, where there are both.
        """
        rows = [_row(item, METRIC, mean(v), standard_error(v), self.tokens) for item, v in self.estimates.items()]
        if self.metric == METRIC:
            return rows
        known = {(r.layer, r.attention, r.ffn): r.value for r in exact_rows if r.metric == self.metric}
        pairs = [(mean(self.estimates[i]), known[i.layer, i.choice.attention, i.choice.ffn]) for i in self.exact]
        calibration = Calibration.fit([x for x, _ in pairs], [y for _, y in pairs])
        for item in self.items:
            if item not in self.exact:
                value = calibration(mean(self.estimates[item]))
                rows.append(_row(item, self.metric, value, value * calibration.spread, 0))
        return rows


def _row(item: Replacement, metric: str, value: float, stderr: float, tokens: int) -> ScoreRow:
    return ScoreRow(item.layer, item.choice.attention, item.choice.ffn, metric, value, stderr, tokens)
