"""Racing: a replacement stops reading text when its score is precise enough. Nothing here runs a model.

Text is read in rounds of 1, 1, 2, 4, ... batches, so every replacement has read a prefix of the same text. One prefix may be harder
than another, and then it raises the damage of everything that is measured on it. Means over different prefixes are therefore not
comparable. `on_all_text` carries the means of those that stopped on to all text. Per layer, metric and round it takes from the
replacements that read on by how much their means have grown, as a geometric mean over them. A mean that stopped is multiplied by the
growths of the rounds that it has missed. One replacement of every layer always reads all text, so that every growth is known.

This is exact where text is harder for all replacements of a layer by the same factor. Where it is not, an error remains that is as
large as the replacements differ. Damage in next-token loss may be negative, so it grows like the KL: that is its mean over the
parent's own predictions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from puzzle_ray.artifacts import ScoreRow
from puzzle_ray.scoring.metrics import mean, standard_error

RACING_SEQUENCES = 8  # with fewer sequences a standard error is too uncertain itself
SIGNED = {"lm_loss": "kl"}  # metrics that may be negative, and the metric by whose growth they grow

History = Sequence[ScoreRow]  # of one replacement: its rows of all metrics after each round that it has read


def batch_rounds(num_texts: int, num_questions: int, racing: bool) -> list[tuple[int, ...]]:
    """The batch numbers of each round. Text batches are numbered first, question batches behind them.

    All question batches are in the first round. Without racing there is one round.
    """
    questions = tuple(range(num_texts, num_texts + num_questions))
    if not racing or num_texts < 2:
        return [(*range(num_texts), *questions)]
    rounds, start = [(0, *questions)], 1
    while start < num_texts:
        stop = min(num_texts, 2 * start)
        rounds.append(tuple(range(start, stop)))
        start = stop
    return rounds


def is_precise(values: Sequence[float], relative_stderr: float) -> bool:
    """Whether the mean's standard error is at most `relative_stderr` times the mean, on at least `RACING_SEQUENCES` sequences."""
    return len(values) >= RACING_SEQUENCES and standard_error(values) <= relative_stderr * abs(mean(values))


def on_all_text(histories: Sequence[History]) -> list[ScoreRow]:
    """The last row of every metric of every replacement, as it would be on all text. `tokens` stays the number that was read."""
    by_layer: dict[int, list[dict[str, dict[int, ScoreRow]]]] = {}
    for history in histories:
        by_layer.setdefault(history[0].layer, []).append(_by_tokens(history))
    growths = {layer: _growths(members) for layer, members in by_layer.items()}
    rows = []
    for history in histories:
        for metric, by_tokens in _by_tokens(history).items():
            last = by_tokens[max(by_tokens)]
            missed = [g for read, g in growths[last.layer].get(SIGNED.get(metric, metric), {}).items() if read >= last.tokens]
            factor = math.prod(missed)
            rows.append(replace(last, value=last.value * factor, stderr=last.stderr * factor) if missed else last)
    return rows


def _by_tokens(history: History) -> dict[str, dict[int, ScoreRow]]:
    """Metric -> number of tokens -> the row of that many tokens."""
    found: dict[str, dict[int, ScoreRow]] = {}
    for row in history:
        found.setdefault(row.metric, {})[row.tokens] = row
    return found


def _growths(members: Sequence[Mapping[str, Mapping[int, ScoreRow]]]) -> dict[str, dict[int, float]]:
    """Metric -> number of tokens -> the growth of means from there to the next round, for the replacements of one layer.

    A replacement whose mean is not positive says nothing about growth. Where none says anything, nothing is taken to grow.
    """
    growths: dict[str, dict[int, float]] = {}
    for metric in dict.fromkeys(metric for member in members for metric in member):
        read = [member[metric] for member in members if metric in member]
        for before, after in pairwise(sorted({tokens for rows in read for tokens in rows})):
            means = [(rows[before].value, rows[after].value) for rows in read if after in rows]
            ratios = [math.log(b / a) for a, b in means if a > 0 and b > 0]
            growths.setdefault(metric, {})[before] = math.exp(mean(ratios)) if ratios else 1.0
    return growths
