"""Exact scores for what an answer rests on: search, score the blocks it uses that are only estimated, search again.

Until a block is scored the search sees its estimate lowered by `OPTIMISM` standard deviations of what such estimates miss. So a block
is passed over only where even that is too much, and one that is taken for its estimate's sake is found out. Where no lowered estimate
is above the truth, the last answer is the one that exact scores of everything would give (as in A* with a heuristic that never
overestimates): its own sum is exact, and no sum of any other architecture was below its truth. Estimates are never negative: an
exchange that betters the parent (`lm_loss` and `downstream` may fall below 0) is not foreseen, and found only by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from puzzle_ray.artifacts import LayerChoice, ScoreRow, Scores
from puzzle_ray.scoring.items import Replacement
from puzzle_ray.scoring.shortlist import METRIC, Calibration

OPTIMISM = 2.0
Choices = Sequence[LayerChoice]
Exchange = tuple[int, str, str]


def _exchange(row: ScoreRow) -> Exchange:
    return row.layer, row.attention, row.ffn


def lowered(scores: Scores, metric: str) -> Scores:
    """`metric` of what is not scored, from its Fisher estimate and all that is: the calibrated estimate, lowered."""
    estimates = {_exchange(row): row.value for row in scores.rows if row.metric == METRIC}
    exact = {_exchange(row): row.value for row in scores.rows if row.metric == metric and row.tokens}
    calibration = Calibration.fit([estimates[key] for key in exact], list(exact.values()))
    factor = math.exp(-OPTIMISM * calibration.spread)

    def seen(row: ScoreRow) -> ScoreRow:
        if row.metric != metric or row.tokens:
            return row
        value = calibration(estimates[_exchange(row)])
        return replace(row, value=value * factor, stderr=value * calibration.spread)

    return Scores(tuple(map(seen, scores.rows)), scores.granularity)


def estimated(scores: Scores, metric: str, architectures: Iterable[Choices]) -> list[Replacement]:
    """The exchanges that these architectures are made of and whose score is an estimate, each once, in order."""
    used = {(layer, choice) for choices in architectures for layer, choice in enumerate(choices)}
    rows = {row for layer, choice in used for row in scores.parts(layer, choice, metric) if not row.tokens}
    return [Replacement(row.layer, LayerChoice(row.attention, row.ffn)) for row in sorted(rows, key=_exchange)]


def with_exact(scores: Scores, rows: Sequence[ScoreRow], metric: str) -> Scores:
    """`rows`, of items scored exactly, in the place of their estimates."""
    new = {_exchange(row) for row in rows}
    kept = (row for row in scores.rows if row.metric != metric or row.tokens or _exchange(row) not in new)
    return Scores((*kept, *rows), scores.granularity)


def settle(
    scores: Scores,
    metric: str,
    answers: Callable[[Scores], Iterable[Choices]],
    score: Callable[[Sequence[Replacement]], Sequence[ScoreRow]],
) -> Scores:
    """Scores by which `answers` rest on exact values only; of what they do not use, the lowered estimates stay.

    `answers` searches; `score` scores items exactly and returns their rows, of all metrics.
    """
    while True:
        seen = lowered(scores, metric)
        missing = estimated(seen, metric, answers(seen))
        if not missing:
            return seen
        scores = with_exact(scores, score(missing), metric)
