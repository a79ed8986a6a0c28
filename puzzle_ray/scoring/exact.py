"""Exact scores for every block that a search's answers use, where a shortlist left some scores estimated.

Search, score exactly the blocks of the answer that are only estimated, and search again, until the answer has no estimate in it.

The search sees an estimate lowered by `OPTIMISM` standard deviations of the calibration's errors. So it avoids a block only where even
the lowered estimate is too high. A block that looks good only because of its estimate becomes part of an answer, is scored exactly,
and is seen as it is in the next search. If no lowered estimate is above its true score, the last answer is the one that exact scores
of all blocks would give. This is A* with a heuristic that never overestimates: the sum of the last answer is exact, and every other
architecture was seen with a sum at or below its true one.

Estimates are never negative. A replacement that improves on the parent (its `lm_loss` or `downstream` may be below 0) is therefore
not predicted, and is found only by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from puzzle_ray.artifacts import LayerChoice, ScoreRow, Scores
from puzzle_ray.scoring.replacements import Replacement
from puzzle_ray.scoring.shortlist import FISHER_METRIC, Calibration

OPTIMISM = 2.0  # standard deviations
Architectures = Iterable[Sequence[LayerChoice]]
ReplacementKey = tuple[int, str, str]  # layer, attention, FFN


def _key(row: ScoreRow) -> ReplacementKey:
    return row.layer, row.attention, row.ffn


def with_lowered_estimates(scores: Scores, metric: str) -> Scores:
    """The scores, with every estimated value of `metric` calibrated anew and lowered.

    The calibration is fitted to all replacements that have an exact score. Rows with `tokens` 0 are estimates.
    """
    estimates = {_key(row): row.value for row in scores.rows if row.metric == FISHER_METRIC}
    exact = {_key(row): row.value for row in scores.rows if row.metric == metric and row.tokens}
    calibration = Calibration.fit([estimates[key] for key in exact], list(exact.values()))
    factor = math.exp(-OPTIMISM * calibration.spread)

    def lowered(row: ScoreRow) -> ScoreRow:
        if row.metric != metric or row.tokens:
            return row
        value = calibration(estimates[_key(row)])
        return replace(row, value=value * factor, stderr=value * calibration.spread)

    return Scores(tuple(map(lowered, scores.rows)), scores.granularity)


def estimated_replacements(scores: Scores, metric: str, architectures: Architectures) -> list[Replacement]:
    """The replacements in these architectures whose score is an estimate, each once, by layer and name."""
    used = {(layer, choice) for choices in architectures for layer, choice in enumerate(choices)}
    rows = {row for layer, choice in used for row in scores.parts(layer, choice, metric) if not row.tokens}
    return [Replacement(row.layer, LayerChoice(row.attention, row.ffn)) for row in sorted(rows, key=_key)]


def with_exact_scores(scores: Scores, rows: Sequence[ScoreRow], metric: str) -> Scores:
    """The scores, with `rows` of exactly scored replacements in place of their estimates of `metric`."""
    new = {_key(row) for row in rows}
    others = (row for row in scores.rows if row.metric != metric or row.tokens or _key(row) not in new)
    return Scores((*others, *rows), scores.granularity)


def exact_where_used(
    scores: Scores,
    metric: str,
    search: Callable[[Scores], Architectures],
    score: Callable[[Sequence[Replacement]], Sequence[ScoreRow]],
) -> Scores:
    """Scores in which every value that the answers of `search` use is exact. What they do not use keeps its lowered estimate.

    `search` returns the architectures it finds with some scores. `score` scores replacements exactly and returns their rows, of all
    metrics.
    """
    while True:
        lowered = with_lowered_estimates(scores, metric)
        estimated = estimated_replacements(lowered, metric, search(lowered))
        if not estimated:
            return lowered
        scores = with_exact_scores(scores, score(estimated), metric)
