"""The scoring stage in one process, without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from puzzle_ray.artifacts import ScoreRow, Scores, SearchSpace
from puzzle_ray.models.blocks import LayerStack
from puzzle_ray.progress import Progress
from puzzle_ray.scoring import fisher
from puzzle_ray.scoring.downstream import QuestionBatch
from puzzle_ray.scoring.replacements import (
    Replacement,
    all_replacements,
    merge_scores,
    replacement_groups,
    saved_score_rows,
    unfinished_groups,
)
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.scoring.shard import ShardScorer, StatesOf
from puzzle_ray.scoring.shortlist import Shortlist, footprints
from puzzle_ray.store import Artifact


class SerialScorer:
    """Scores replacements in this process. `stack` holds the whole parent; `texts` are token ids, `[batch, tokens]`.

    The parent runs when the first replacement is scored, so not at all where every score is in the artifact already.
    """

    def __init__(
        self,
        stack: LayerStack,
        texts: Sequence[Tensor],
        config: ScoringConfig,
        artifact: Artifact,
        states_of: StatesOf,
        progress: Progress,
        questions: Sequence[QuestionBatch] = (),
    ) -> None:
        self.stack, self.texts, self.questions = stack, texts, questions
        self.config, self.artifact, self.states_of, self.progress = config, artifact, states_of, progress

    @cached_property
    def shard(self) -> ShardScorer:
        """A scorer that has run the parent on all texts and questions."""
        scorer = ShardScorer(self.stack, self.texts, self.questions)
        scorer.run_parent(scorer.input_ids)
        return scorer

    def score(self, replacements: Sequence[Replacement], config: ScoringConfig | None = None) -> list[ScoreRow]:
        """The rows of these replacements. Those that are not in the artifact yet are scored first."""
        groups = replacement_groups(replacements, config or self.config, len(self.texts), len(self.questions))
        unfinished = unfinished_groups(groups, self.artifact)
        with self.progress.stage("score", len(replacements), "block") as bar:
            bar.advance(len(replacements) - sum(len(group.replacements) for group in unfinished))
            for group in unfinished:
                while (task := group.next_task()) is not None:
                    group.add(task, self.shard.measure(task, self.shard.run_replacements(task, self.states_of)))
                group.save(self.artifact)
                bar.advance(len(group.replacements))
        return saved_score_rows(replacements, self.artifact)

    def score_alone(self, replacements: Sequence[Replacement]) -> list[ScoreRow]:
        """The same, with every replacement in a batch of its own and on all text: see `ScoringConfig.alone`."""
        return self.score(replacements, self.config.alone)

    def estimate(self, space: SearchSpace) -> fisher.Estimates:
        """The Fisher estimates of all replacements. Those that are not in the artifact yet are computed first."""
        for name, batches in fisher.unfinished_estimate_tasks(len(self.texts), self.artifact):
            estimates, _ = fisher.shard_estimates(self.shard, batches, None, space, self.config, self.states_of)
            fisher.save_estimates(self.artifact, name, [estimates])
        return fisher.load_estimates(len(self.texts), self.artifact)


def score_serially(
    stack: LayerStack,
    texts: Sequence[Tensor],
    space: SearchSpace,
    config: ScoringConfig,
    artifact: Artifact,
    states_of: StatesOf,
    progress: Progress,
    questions: Sequence[QuestionBatch] = (),
) -> Scores:
    """The scoring stage in this process. `stack` holds the whole parent; `texts` are token ids, `[batch, tokens]`."""
    replacements = all_replacements(space, config.granularity)
    scorer = SerialScorer(stack, texts, config, artifact, states_of, progress, questions)
    shortlist = None
    if config.shortlist == "fisher":
        tokens = sum(ids.numel() for ids in texts)
        sizes = footprints(space, stack.descriptor, stack.config)
        shortlist = Shortlist.of(replacements, scorer.estimate(space), tokens, sizes, space, config)
    rows = scorer.score(shortlist.exact if shortlist else replacements)
    return merge_scores(rows + shortlist.rows(rows) if shortlist else rows, config, artifact)
