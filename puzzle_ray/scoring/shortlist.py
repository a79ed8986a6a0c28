"""Chooses which replacements are scored exactly, and gives the others a score calibrated from their estimate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from puzzle_ray.artifacts import KINDS, LayerChoice, LayerSpace, ScoreRow, SearchSpace, SubblockKind
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.models.blocks import model_class_of, swapped
from puzzle_ray.profiling.memory import subblock_weights
from puzzle_ray.scoring.fisher import Estimates, estimate_key
from puzzle_ray.scoring.metrics import mean, standard_error
from puzzle_ray.scoring.replacements import Replacement
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.surgery.projections import AttentionProjections
from puzzle_ray.surgery.subblocks import LinearAttention, NoopAttention

FISHER_METRIC = "fisher"
MAX_EXPONENT = 4.0  # where estimates hardly differ, a fit without a limit could give any exponent
Footprint = tuple[int, int]  # number of parameters, width of the keys of one token
Footprints = Mapping[tuple[LayerSpace, SubblockKind, str], Footprint]


def footprints(space: SearchSpace, descriptor: Descriptor, config: Any) -> Footprints:
    """The footprint of every subblock variant in the space. No weights are allocated."""
    with torch.device("meta"):
        model = model_class_of(config, descriptor)._from_config(config)
        by_variant: dict[tuple[LayerSpace, SubblockKind, str], Footprint] = {}
        for index, layer_space in enumerate(space.layers):
            parent = model.get_submodule(f"{descriptor.layers}.{index}")
            for kind in KINDS:
                for name in layer_space.variants(kind):
                    if (layer_space, kind, name) not in by_variant:
                        layer = swapped(parent, LayerChoice(**{kind: name}), descriptor, config)
                        by_variant[layer_space, kind, name] = _footprint(layer, kind, descriptor)
    return by_variant


def _footprint(layer: nn.Module, kind: SubblockKind, descriptor: Descriptor) -> Footprint:
    num_params = subblock_weights(layer, kind, descriptor).num_params
    no_cache = isinstance(layer.get_submodule(descriptor.attention), (NoopAttention, LinearAttention))
    if kind == "ffn" or no_cache:
        return num_params, 0
    return num_params, AttentionProjections.of(layer, descriptor).key.weight_OI.shape[0]


def choose_exact(
    replacements: Sequence[Replacement],
    estimates: Mapping[Replacement, float],
    footprints: Mapping[Replacement, Footprint],
    share: float,
) -> tuple[Replacement, ...]:
    """The replacements to score exactly: a share of those of every layer, rounded up, in the order of `replacements`.

    A replacement is dominated where another one of its layer is no worse in the estimate and in both numbers of the footprint, and
    better in one of them. Those that are not dominated are chosen first, and within both groups those with the lowest estimates.
    """

    def dominated(replacement: Replacement, rivals: Sequence[Replacement]) -> bool:
        own = (estimates[replacement], *footprints[replacement])
        others = ((estimates[rival], *footprints[rival]) for rival in rivals)
        return any(other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in others)

    chosen: set[Replacement] = set()
    for layer in sorted({replacement.layer for replacement in replacements}):
        rivals = [replacement for replacement in replacements if replacement.layer == layer]
        ordered = sorted(rivals, key=lambda replacement: (dominated(replacement, rivals), estimates[replacement]))
        chosen.update(ordered[: math.ceil(share * len(ordered))])
    return tuple(replacement for replacement in replacements if replacement in chosen)


@dataclass(frozen=True)
class Calibration:
    """exact = factor * estimate ** exponent, fitted in logarithms. `spread` is the standard deviation of the errors in logarithms."""

    factor: float = 1.0
    exponent: float = 1.0
    spread: float = 0.0

    @classmethod
    def fit(cls, estimates: Sequence[float], exact: Sequence[float]) -> Calibration:
        """Fits a curve that always increases.

        Pairs in which a value is not positive are left out. With fewer than three pairs left, only the factor is fitted.
        """
        pairs = [(math.log(x), math.log(y)) for x, y in zip(estimates, exact, strict=True) if x > 0 and y > 0]
        if not pairs:
            return cls()
        x0, y0 = mean([x for x, _ in pairs]), mean([y for _, y in pairs])
        variance = sum((x - x0) ** 2 for x, _ in pairs)
        slope = sum((x - x0) * (y - y0) for x, y in pairs) / variance if len(pairs) > 2 and variance > 0 else 1.0
        slope = min(slope, MAX_EXPONENT) if slope > 0 else 1.0
        errors = [y - y0 - slope * (x - x0) for x, y in pairs]
        spread = (sum(error * error for error in errors) / max(1, len(pairs) - 2)) ** 0.5
        return cls(math.exp(y0 - slope * x0), slope, spread)

    def __call__(self, estimate: float) -> float:
        return self.factor * max(estimate, 0.0) ** self.exponent


@dataclass(frozen=True)
class Shortlist:
    """Which of all `replacements` are to be scored exactly, and the estimates of all of them.

    `exact` has the replacements to score exactly. `estimates` has one value per sequence, `tokens` is the number of tokens they were
    taken on, and `metric` is the one that the search adds up.
    """

    replacements: tuple[Replacement, ...]
    exact: tuple[Replacement, ...]
    estimates: Mapping[Replacement, tuple[float, ...]]
    tokens: int
    metric: str

    @classmethod
    def of(
        cls,
        replacements: Sequence[Replacement],
        by_key: Estimates,
        tokens: int,
        of_subblocks: Footprints,
        space: SearchSpace,
        config: ScoringConfig,
    ) -> Shortlist:
        """`by_key` has the estimates as the store keeps them, taken on `tokens` tokens. `of_subblocks` comes from `footprints`."""
        estimates = {replacement: tuple(by_key[estimate_key(replacement)]) for replacement in replacements}

        def footprint(replacement: Replacement) -> Footprint:
            layer = space.layers[replacement.layer]
            parts = [of_subblocks[layer, kind, replacement.choice.variant(kind)] for kind in KINDS]
            return sum(num_params for num_params, _ in parts), sum(width for _, width in parts)

        means = {replacement: mean(values) for replacement, values in estimates.items()}
        sizes = {replacement: footprint(replacement) for replacement in replacements}
        exact = choose_exact(replacements, means, sizes, config.shortlist_keep)
        return cls(tuple(replacements), exact, estimates, tokens, config.metric)

    def rows(self, exact_rows: Sequence[ScoreRow]) -> list[ScoreRow]:
        """Rows of metric `fisher` for every replacement, and rows of `metric` for those that are not scored exactly.

        The value of the latter is their calibrated estimate, and `tokens` 0 marks it. Its stderr is the spread of the calibration:
        how far estimates are from exact scores where there are both.
        """
        rows = [_row(r, FISHER_METRIC, mean(v), standard_error(v), self.tokens) for r, v in self.estimates.items()]
        if self.metric == FISHER_METRIC:
            return rows
        exact = {(row.layer, row.attention, row.ffn): row.value for row in exact_rows if row.metric == self.metric}
        pairs = [(mean(self.estimates[r]), exact[r.layer, r.choice.attention, r.choice.ffn]) for r in self.exact]
        calibration = Calibration.fit([x for x, _ in pairs], [y for _, y in pairs])
        for replacement in self.replacements:
            if replacement not in self.exact:
                value = calibration(mean(self.estimates[replacement]))
                rows.append(_row(replacement, self.metric, value, value * calibration.spread, 0))
        return rows


def _row(replacement: Replacement, metric: str, value: float, stderr: float, tokens: int) -> ScoreRow:
    choice = replacement.choice
    return ScoreRow(replacement.layer, choice.attention, choice.ffn, metric, value, stderr, tokens)
