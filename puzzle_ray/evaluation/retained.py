"""What a child kept of its parent's results, with confidence intervals by a paired bootstrap.

Parent and child answered the same questions. So questions are drawn with replacement, and both models' values of a drawn question go
together: what is hard for both does not widen the interval. Tasks are strata: each draw has as many questions of a task as there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
AT_ONCE = 4_000_000  # random numbers drawn at once


@dataclass(frozen=True)
class Paired:
    """The values of one task, one per question, of both models in the same order; `chance` is what guessing gives, where that is known."""

    parent: Sequence[float]
    child: Sequence[float]
    chance: float | None = None

    def __post_init__(self) -> None:
        if len(self.parent) != len(self.child) or not self.parent:
            raise ValueError(f"{len(self.parent)} values of the parent and {len(self.child)} of the child")


@dataclass(frozen=True)
class Interval:
    """A value, and the bounds of its confidence interval. Bounds are None where some draws have no such value, and where every draw is
    the same, which says nothing of other questions: where all of them were answered alike, as one alone is, and of what a child kept
    where it differs from the parent in none, or is right in none. So it is for a mean over entries of which one has a single question."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Retained:
    """Of an entry, or of the mean over entries.

    `parent` and `child` are means over questions. `retained` is child / parent; None where the parent's mean is 0. `difference` is
    child - parent. `above_chance` is (child - chance) / (parent - chance); None where the parent itself is not above chance by its own
    interval, since then there was nothing to keep. A parent that is right everywhere is above chance where guessing is not as lucky.
    """

    parent: Interval
    child: Interval
    difference: Interval
    retained: Interval | None
    chance: float | None
    above_chance: Interval | None
    questions: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def retained(entries: Mapping[str, Sequence[Paired]], seed: int, resamples: int, confidence: float) -> dict[str, Retained]:
    """Every entry's, and under the name "" the mean over entries, each of which counts once.

    An entry has one or more tasks; its mean is over all their questions. The draws are a function of the seed and the entry's name.
    """
    draws: dict[str, tuple[Floats, Floats]] = {}
    found: dict[str, Retained] = {}
    chances: list[float | None] = []
    for name, tasks in entries.items():
        counts = [len(task.parent) for task in tasks]
        generator = np.random.default_rng([seed, *name.encode()])
        pairs = [_resampled(task, generator, resamples) for task in tasks]
        parent, child = (sum(pair[i] * n for pair, n in zip(pairs, counts, strict=True)) / sum(counts) for i in (0, 1))
        draws[name] = (np.asarray(parent), np.asarray(child))
        chance = None
        if all(task.chance is not None for task in tasks):
            chance = sum((task.chance or 0.0) * n for task, n in zip(tasks, counts, strict=True)) / sum(counts)
        chances.append(chance)
        means = [sum(sum(getattr(task, who)) for task in tasks) / sum(counts) for who in ("parent", "child")]
        found[name] = _described(means[0], means[1], *draws[name], chance, sum(counts), confidence)
    if found:
        known = [chance for chance in chances if chance is not None]
        chance = sum(known) / len(known) if len(known) == len(chances) else None
        mean_parent, mean_child = (np.mean([pair[i] for pair in draws.values()], axis=0) for i in (0, 1))
        whole = [float(np.mean([getattr(entry, who).value for entry in found.values()])) for who in ("parent", "child")]
        questions = sum(entry.questions for entry in found.values())
        if any(entry.questions == 1 for entry in found.values()):  # its draws are all the same, and would narrow the mean's
            found[""] = _without_bounds(whole[0], whole[1], chance, questions, confidence)
        else:
            found[""] = _described(whole[0], whole[1], mean_parent, mean_child, chance, questions, confidence)
    return found


def _resampled(task: Paired, generator: np.random.Generator, resamples: int) -> tuple[Floats, Floats]:
    """The means of parent and child in every draw, `[resamples]` each.

    Questions with the same pair of values are interchangeable. How often each pair is drawn is multinomial, which is the bootstrap
    itself, at the cost of a handful of numbers per draw where values are right or wrong.
    """
    values = np.stack([np.asarray(task.parent, np.float64), np.asarray(task.child, np.float64)], axis=1)
    pairs, counts = np.unique(values, axis=0, return_counts=True)
    total = int(counts.sum())
    size = max(1, AT_ONCE // len(pairs))
    sums = [
        generator.multinomial(total, counts / total, size=min(size, resamples - start)) @ pairs
        for start in range(0, resamples, size)
    ]
    means = np.concatenate(sums) / total
    return means[:, 0], means[:, 1]


def _described(
    parent: float, child: float, parents: Floats, children: Floats, chance: float | None, questions: int, confidence: float
) -> Retained:
    if not np.ptp(parents) and not np.ptp(children):
        return _without_bounds(parent, child, chance, questions, confidence)
    own = _interval(parent, parents, confidence)
    kept = _ratio(child, parent, children, parents, confidence) if parent else None
    above = None
    if chance is not None and own.low is not None and own.low > chance:
        above = _ratio(child - chance, parent - chance, children - chance, parents - chance, confidence)
    difference, whole = _interval(child - parent, children - parents, confidence), _interval(child, children, confidence)
    if not np.ptp(children):
        whole = Interval(child, None, None)
        kept = kept if child else kept and Interval(kept.value, None, None)
    if np.allclose(children, parents, rtol=0, atol=1e-12):  # the same answer to every question
        difference = Interval(difference.value, None, None)
        kept, above = (value and Interval(value.value, None, None) for value in (kept, above))
    return Retained(own, whole, difference, kept, chance, above, questions)


def _without_bounds(parent: float, child: float, chance: float | None, questions: int, confidence: float) -> Retained:
    def alone(value: float) -> Interval:
        return Interval(value, None, None)

    kept, above = alone(child / parent) if parent else None, None
    if chance is not None and parent == 1.0 and chance**questions <= (1 - confidence) / 2:
        above = alone((child - chance) / (parent - chance))
    return Retained(alone(parent), alone(child), alone(child - parent), kept, chance, above, questions)


def _ratio(top: float, bottom: float, tops: Floats, bottoms: Floats, confidence: float) -> Interval:
    """Without bounds where a draw's denominator is not positive: that ratio means nothing, and leaving it out would narrow the interval."""
    if (bottoms <= 0).any():
        return Interval(top / bottom, None, None)
    return _interval(top / bottom, tops / bottoms, confidence)


def _interval(value: float, draws: Floats, confidence: float) -> Interval:
    """The percentile interval."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(value), float(low), float(high))
