"""What is scored, in which order and on how much data; how it is kept; nothing here computes with a model.

Candidates of one layer form groups that run through the suffix together. Without racing a group reads all batches at once. With
racing it reads 1, 1, 2, 4 ... batches, and a candidate leaves when its standard error is settled, so that the rest goes on alone.
What a group does depends on its own values only: never on other groups, on timing, or on which process does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from puzzle_ray.artifacts import LayerChoice, ScoreRow, Scores, SearchSpace
from puzzle_ray.errors import ConfigError
from puzzle_ray.scoring.metrics import PredictionMetrics, mean, standard_error
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.store import Artifact

SCORES_TABLE = "scores.parquet"
DOWNSTREAM = "downstream"
RACING_SEQUENCES = 8  # fewer say too little about their own standard error


@dataclass(frozen=True)
class Replacement:
    """One exchange to score."""

    layer: int
    choice: LayerChoice

    @property
    def name(self) -> str:
        words = f"{self.choice.attention}+{self.choice.ffn}"
        return f"items/layer_{self.layer:03d}.{''.join(c if c.isalnum() or c in '+._' else '-' for c in words)}.json"


def replacements(space: SearchSpace, granularity: str) -> list[Replacement]:
    """`block`: every pair of variants; `subblock`: each variant beside the parent's other half. Raises ConfigError for coupled pairs
    that would be scored by halves."""
    items = []
    for index, layer in enumerate(space.layers):
        if layer.coupled and granularity == "subblock":
            raise ConfigError("scoring.granularity", "coupled pairs have no halves to score", "write scoring.granularity: block")
        for choice in layer.choices:
            one_half = "parent" in (choice.attention, choice.ffn)
            if choice != LayerChoice() and (granularity == "block" or one_half):
                items.append(Replacement(index, choice))
    return items


@dataclass(frozen=True)
class Damage:
    """Differences from the parent, 0 for none: metric -> one value per sequence (per question for `downstream`), and tokens read."""

    values: Mapping[str, tuple[float, ...]]
    tokens: Mapping[str, int]

    @classmethod
    def of(cls, metrics: PredictionMetrics, parent_loss: Sequence[float]) -> Damage:
        values = {
            "kl": metrics.kl,
            "lm_loss": tuple(c - p for c, p in zip(metrics.lm_loss, parent_loss, strict=True)),
            "top1_disagreement": tuple(1.0 - a for a in metrics.top1_agreement),
            "top5_disagreement": tuple(1.0 - a for a in metrics.top5_agreement),
            "top10_disagreement": tuple(1.0 - a for a in metrics.top10_agreement),
            "cosine_distance": metrics.cosine_distance,
            "normalised_mse": metrics.normalised_mse,
        }
        return cls(values, dict.fromkeys(values, metrics.tokens))

    @classmethod
    def joined(cls, parts: Sequence[Damage]) -> Damage:
        """In order of first appearance."""
        names = dict.fromkeys(name for part in parts for name in part.values)
        values = {name: tuple(v for part in parts for v in part.values.get(name, ())) for name in names}
        return cls(values, {name: sum(part.tokens.get(name, 0) for part in parts) for name in names})


@dataclass(frozen=True)
class ScoringTask:
    """Candidates of one layer, and the evaluation batches they are to be run on now."""

    items: tuple[Replacement, ...]
    batches: tuple[int, ...]

    @property
    def layer(self) -> int:
        return self.items[0].layer


def rounds(num_texts: int, num_questions: int, racing: bool) -> list[tuple[int, ...]]:
    """Batch numbers of each round: text batches first in the numbering, question batches behind them (all in the first round)."""
    questions = tuple(range(num_texts, num_texts + num_questions))
    if not racing or num_texts < 2:
        return [(*range(num_texts), *questions)]
    found, start = [(0, *questions)], 1
    while start < num_texts:
        stop = min(num_texts, 2 * start)
        found.append(tuple(range(start, stop)))
        start = stop
    return found


def settled(values: Sequence[float], relative_stderr: float) -> bool:
    """The mean is known well enough: its standard error is at most `relative_stderr` of it."""
    return len(values) >= RACING_SEQUENCES and standard_error(values) <= relative_stderr * abs(mean(values))


@dataclass
class Group:
    """Candidates on their way. Ask for the next task, add what was measured, until there is no task."""

    items: tuple[Replacement, ...]
    rounds: Sequence[tuple[int, ...]]
    config: ScoringConfig
    measured: dict[Replacement, list[Damage]] = field(default_factory=dict)
    done: int = 0

    def next_task(self) -> ScoringTask | None:
        if self.done == len(self.rounds):
            return None
        racing = tuple(item for item in self.items if self.done == 0 or not self._settled(item))
        return ScoringTask(racing, self.rounds[self.done]) if racing else None

    def add(self, task: ScoringTask, found: Sequence[Damage]) -> None:
        for item, damage in zip(task.items, found, strict=True):
            self.measured.setdefault(item, []).append(damage)
        self.done += 1

    def _settled(self, item: Replacement) -> bool:
        damage = Damage.joined(self.measured[item])
        metric = self.config.metric if self.config.metric in damage.values and self.config.metric != DOWNSTREAM else "kl"
        return settled(damage.values[metric], self.config.racing_stderr)

    def save(self, artifact: Artifact) -> None:
        for item in self.items:
            artifact.write_json(item.name, [asdict(row) for row in rows_of(item, Damage.joined(self.measured[item]))])


def groups(items: Sequence[Replacement], config: ScoringConfig, num_texts: int, num_questions: int) -> list[Group]:
    """Up to `candidate_batch` candidates of one layer each, in order."""
    schedule = rounds(num_texts, num_questions, config.racing)
    found: list[Group] = []
    for item in items:
        last = found[-1] if found else None
        if last and last.items[0].layer == item.layer and len(last.items) < config.candidate_batch:
            last.items = (*last.items, item)
        else:
            found.append(Group((item,), schedule, config))
    return found


def rows_of(item: Replacement, damage: Damage) -> list[ScoreRow]:
    """One row per metric. `tokens` is what was really read: with racing, it differs between candidates."""
    choice = item.choice
    return [
        ScoreRow(item.layer, choice.attention, choice.ffn, metric, mean(values), standard_error(values), damage.tokens[metric])
        for metric, values in damage.values.items()
    ]


def unfinished(found: Iterable[Group], artifact: Artifact) -> list[Group]:
    """Groups with a candidate that is not in the step yet: they are done again whole, so that the numbers stay the same bits."""
    there = set(artifact.names("items"))
    return [group for group in found if any(item.name.removeprefix("items/") not in there for item in group.items)]


def saved_rows(items: Sequence[Replacement], artifact: Artifact) -> list[ScoreRow]:
    return [ScoreRow(**row) for item in items for row in artifact.read_json(item.name)]


def merge(rows: Sequence[ScoreRow], config: ScoringConfig, artifact: Artifact) -> Scores:
    """All rows as one table; closes the step."""
    scores = Scores(tuple(rows), config.granularity)
    artifact.write(SCORES_TABLE, scores.to_parquet())
    of_metric = [row for row in rows if row.metric == config.metric]
    worst = max(of_metric, key=lambda row: row.value, default=None)
    facts = {
        "items": len(of_metric),
        "estimated": sum(row.tokens == 0 for row in of_metric),
        "tokens": sum(r.tokens for r in of_metric),
    }
    artifact.finish(facts | {"worst": asdict(worst) if worst else None})
    return scores
