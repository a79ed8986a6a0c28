"""The replacements that are scored, how they are divided into tasks, and how their scores are kept. Nothing here runs a model.

A replacement is one layer with another choice than the parent's. Replacements of one layer form groups that run through the layers
behind it together. Without racing, a group reads all batches at once. With racing it reads 1, 1, 2, 4, ... batches. A replacement
whose standard error is small enough then leaves its group, and the others read on; the first replacement of a layer never leaves.
What a group does depends on its own values only: not on other groups, not on timing, and not on which process does it. Scores of
those that left are made comparable when rows are read: see `puzzle_ray.scoring.racing`.

Rounds are read in chunks (see `puzzle_ray.scoring.plan`), and all groups read a chunk before anyone reads the next. What a group has
found so far is kept in the artifact, batch by batch, so that an interrupted run reads nothing twice, in whatever chunks it goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from puzzle_ray.artifacts import LayerChoice, ScoreRow, Scores, SearchSpace
from puzzle_ray.errors import ConfigError
from puzzle_ray.scoring.metrics import PredictionMetrics, mean, standard_error
from puzzle_ray.scoring.plan import Chunk
from puzzle_ray.scoring.racing import batch_rounds, is_precise, on_all_text
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.store import Artifact

SCORES_TABLE = "scores.parquet"
DOWNSTREAM = "downstream"
_FOLDER = "items"  # one file per replacement
_PARTS = "parts"  # one file per group and chunk, until the group is finished


@dataclass(frozen=True)
class Replacement:
    """One layer whose subblocks are replaced by `choice`; every other layer stays the parent's."""

    layer: int
    choice: LayerChoice

    @property
    def file_name(self) -> str:
        """The file of its scores in the artifact."""
        label = f"{self.choice.attention}+{self.choice.ffn}"
        return f"{_FOLDER}/layer_{self.layer:03d}.{''.join(c if c.isalnum() or c in '+._' else '-' for c in label)}.json"


def all_replacements(space: SearchSpace, granularity: str) -> list[Replacement]:
    """Every replacement that a search space needs scores for, by layer.

    With granularity `block` these are all pairs of variants. With `subblock` they are every variant beside the parent's other half.
    Raises ConfigError where coupled pairs would be scored by halves.
    """
    replacements = []
    for index, layer in enumerate(space.layers):
        if layer.coupled and granularity == "subblock":
            raise ConfigError("scoring.granularity", "coupled pairs have no halves to score", "write scoring.granularity: block")
        for choice in layer.choices:
            one_half = "parent" in (choice.attention, choice.ffn)
            if choice != LayerChoice() and (granularity == "block" or one_half):
                replacements.append(Replacement(index, choice))
    return replacements


@dataclass(frozen=True)
class Damage:
    """What a replacement costs in quality, as differences from the parent. 0 is no damage.

    `values` maps each metric to one value per sequence; metric `downstream` has one value per question. `tokens` maps each metric to
    the number of tokens that were read for it.
    """

    values: Mapping[str, tuple[float, ...]]
    tokens: Mapping[str, int]

    @classmethod
    def of(cls, metrics: PredictionMetrics, parent_loss: Sequence[float]) -> Damage:
        """`parent_loss` is the parent's own next-token loss, one value per sequence."""
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
    def from_json(cls, entry: Mapping[str, Any]) -> Damage:
        return cls({name: tuple(values) for name, values in entry["values"].items()}, dict(entry["tokens"]))

    @classmethod
    def joined(cls, parts: Sequence[Damage]) -> Damage:
        """Several batches as one. Metrics are in the order in which they first appear."""
        names = dict.fromkeys(name for part in parts for name in part.values)
        values = {name: tuple(v for part in parts for v in part.values.get(name, ())) for name in names}
        return cls(values, {name: sum(part.tokens.get(name, 0) for part in parts) for name in names})


@dataclass(frozen=True)
class ScoringTask:
    """Replacements of one layer, and the numbers of the evaluation batches to run them on now."""

    replacements: tuple[Replacement, ...]
    batches: tuple[int, ...]

    @property
    def layer(self) -> int:
        return self.replacements[0].layer


@dataclass
class ReplacementGroup:
    """Replacements of one layer on their way to their scores. Ask for the task of every chunk, in order, and add its damage.

    Where it is the `first` group of its layer, its first replacement reads all text. `measured` has the damage on every batch read.
    """

    replacements: tuple[Replacement, ...]
    rounds: Sequence[tuple[int, ...]]
    config: ScoringConfig
    first: bool = False
    measured: dict[Replacement, dict[int, Damage]] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)  # names of the files that hold it

    def task(self, chunk: Chunk) -> ScoringTask | None:
        """What is to be done of a chunk; None where that is nothing."""
        racing = self.racing(chunk.round)
        missing = tuple(n for n in chunk.batches if any(n not in self.measured.get(r, {}) for r in racing))
        return ScoringTask(racing, missing) if missing else None

    def add(self, task: ScoringTask, damages: Sequence[Sequence[Damage]]) -> None:
        """`damages` has, for every replacement of the task, one entry per batch, both in order."""
        for replacement, of_batches in zip(task.replacements, damages, strict=True):
            self.measured.setdefault(replacement, {}).update(zip(task.batches, of_batches, strict=True))

    def racing(self, number: int) -> tuple[Replacement, ...]:
        """Who reads a round. Every round before it must have been read."""
        return tuple(r for r in self.replacements if not any(self._leaves_after(r, n) for n in range(number)))

    @property
    def finished(self) -> bool:
        """Whether nobody has anything left to read."""
        for number, batches in enumerate(self.rounds):
            if any(batch not in self.measured.get(r, {}) for r in self.racing(number) for batch in batches):
                return False
        return True

    def _read(self, replacement: Replacement, number: int) -> Damage:
        """What a replacement has measured up to the end of a round."""
        measured = self.measured[replacement]
        return Damage.joined([measured[batch] for batches in self.rounds[: number + 1] for batch in batches])

    def _leaves_after(self, replacement: Replacement, number: int) -> bool:
        if self.first and replacement == self.replacements[0]:
            return False
        damage = self._read(replacement, number)
        metric = self.config.metric if self.config.metric in damage.values and self.config.metric != DOWNSTREAM else "kl"
        return is_precise(damage.values[metric], self.config.racing_stderr)

    def save(self, artifact: Artifact) -> None:
        """Writes one file per replacement: its score rows after every round that it has read. Parts are not needed any more."""
        for replacement in self.replacements:
            of_rounds = [n for n, batches in enumerate(self.rounds) if batches[0] in self.measured[replacement]]
            rows = [row for n in of_rounds for row in score_rows(replacement, self._read(replacement, n))]
            artifact.write_json(replacement.file_name, [asdict(row) for row in rows])
        for name in self.parts:
            artifact.remove(name)

    @property
    def _label(self) -> str:
        """How the names of its parts begin. It is another one for every group and every way to make groups."""
        words = [len(self.replacements), *(r.choice.label for r in self.replacements)]
        return f"layer_{self.replacements[0].layer:03d}.{hashlib.sha256(repr(words).encode()).hexdigest()[:16]}."

    def save_part(self, task: ScoringTask, artifact: Artifact) -> None:
        """Writes what was measured in a task, so that it need not be measured again."""
        rows = [[asdict(self.measured[r][batch]) for batch in task.batches] for r in task.replacements]
        part = {"replacements": [self.replacements.index(r) for r in task.replacements], "batches": task.batches, "damage": rows}
        self.parts.append(f"{_PARTS}/{self._label}{task.batches[0]:06d}.json")
        artifact.write_json(self.parts[-1], part)

    def load_parts(self, artifact: Artifact, names: Iterable[str]) -> None:
        """Takes up what an interrupted run has measured; `names` are those of all parts."""
        for name in sorted(names):
            if name.startswith(self._label):
                self.parts.append(f"{_PARTS}/{name}")
                part = artifact.read_json(self.parts[-1])
                replacements = tuple(self.replacements[n] for n in part["replacements"])
                damages = [[Damage.from_json(entry) for entry in row] for row in part["damage"]]
                self.add(ScoringTask(replacements, tuple(part["batches"])), damages)


def replacement_groups(
    replacements: Sequence[Replacement], config: ScoringConfig, num_texts: int, num_questions: int
) -> list[ReplacementGroup]:
    """The replacements, in order, in groups of one layer and of at most `candidate_batch`. Layers come one after the other."""
    rounds = [batches for batches in batch_rounds(num_texts, num_questions, config.racing) if batches]
    groups: list[ReplacementGroup] = []
    for replacement in replacements:
        last = groups[-1] if groups else None
        if last and last.replacements[0].layer == replacement.layer and len(last.replacements) < config.candidate_batch:
            last.replacements = (*last.replacements, replacement)
        else:
            new = last is None or last.replacements[0].layer != replacement.layer
            groups.append(ReplacementGroup((replacement,), rounds, config, first=new))
    return groups


def score_rows(replacement: Replacement, damage: Damage) -> list[ScoreRow]:
    """One row per metric. `tokens` is the number of tokens that were read."""
    layer, choice = replacement.layer, replacement.choice
    return [
        ScoreRow(layer, choice.attention, choice.ffn, metric, mean(values), standard_error(values), damage.tokens[metric])
        for metric, values in damage.values.items()
    ]


def unfinished_groups(groups: Iterable[ReplacementGroup], artifact: Artifact) -> list[ReplacementGroup]:
    """Groups with a replacement that has no file yet, with what they have measured already."""
    existing, parts = set(artifact.names(_FOLDER)), artifact.names(_PARTS)
    found = [g for g in groups if any(r.file_name.removeprefix(f"{_FOLDER}/") not in existing for r in g.replacements)]
    for group in found:
        group.load_parts(artifact, parts)
    return found


def keep(group: ReplacementGroup, task: ScoringTask, artifact: Artifact) -> int:
    """Writes what a group has measured in a task. Returns how many replacements are finished by that."""
    if group.finished:
        group.save(artifact)
        return len(group.replacements)
    group.save_part(task, artifact)
    return 0


def saved_score_rows(replacements: Sequence[Replacement], artifact: Artifact) -> list[ScoreRow]:
    """The rows of replacements that are scored already, all as on the same text."""
    return on_all_text([[ScoreRow(**row) for row in artifact.read_json(r.file_name)] for r in replacements])


def merge_scores(rows: Sequence[ScoreRow], config: ScoringConfig, artifact: Artifact) -> Scores:
    """Writes all rows as one table and finishes the artifact."""
    scores = Scores(tuple(rows), config.granularity)
    artifact.write(SCORES_TABLE, scores.to_parquet())
    of_metric = [row for row in rows if row.metric == config.metric]
    worst = max(of_metric, key=lambda row: row.value, default=None)
    facts = {
        "items": len(of_metric),
        "estimated": sum(row.tokens == 0 for row in of_metric),
        "tokens": sum(r.tokens for r in of_metric),
    }
    drop = [f"{_PARTS}/{name}" for name in artifact.names(_PARTS)]
    artifact.finish(facts | {"worst": asdict(worst) if worst else None}, drop=drop)
    return scores
