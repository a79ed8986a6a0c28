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
from puzzle_ray.scoring.items import Replacement, groups, merge, replacements, saved_rows, unfinished
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.scoring.shard import ShardScorer, StatesOf
from puzzle_ray.scoring.shortlist import Shortlist, footprints
from puzzle_ray.store import Artifact


class SerialScorer:
    """Scores replacements in this process, with the whole parent in `stack`. The parent runs when the first is scored."""

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
        """The parent's activations on all texts and questions."""
        scorer = ShardScorer(self.stack, self.texts, self.questions)
        scorer.run_parent(scorer.input_ids)
        return scorer

    def score(self, wanted: Sequence[Replacement], config: ScoringConfig | None = None) -> list[ScoreRow]:
        """The rows of these replacements; those that are not in the artifact yet are scored first."""
        all_groups = groups(wanted, config or self.config, len(self.texts), len(self.questions))
        todo = unfinished(all_groups, self.artifact)
        with self.progress.stage("score", len(wanted), "block") as bar:
            bar.advance(len(wanted) - sum(len(group.items) for group in todo))
            for group in todo:
                while (task := group.next_task()) is not None:
                    group.add(task, self.shard.measure(task, self.shard.exchange(task, self.states_of)))
                group.save(self.artifact)
                bar.advance(len(group.items))
        return saved_rows(wanted, self.artifact)

    def score_alone(self, wanted: Sequence[Replacement]) -> list[ScoreRow]:
        """The same, one at a time: whom a replacement would share a batch with depends on who asks."""
        return self.score(wanted, self.config.model_copy(update={"candidate_batch": 1}))

    def estimate(self, space: SearchSpace) -> fisher.Estimates:
        """Fisher estimates of all replacements; those that are not in the artifact yet are made first."""
        for name, batches in fisher.unfinished(len(self.texts), self.artifact):
            found, _ = fisher.shard_estimates(self.shard, batches, None, space, self.config, self.states_of)
            fisher.save(self.artifact, name, [found])
        return fisher.load(len(self.texts), self.artifact)


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
    """The scoring stage in this process, without Ray. `stack` holds the whole parent."""
    items = replacements(space, config.granularity)
    scorer = SerialScorer(stack, texts, config, artifact, states_of, progress, questions)
    shortlist = None
    if config.shortlist == "fisher":
        tokens = sum(ids.numel() for ids in texts)
        sizes = footprints(space, stack.descriptor, stack.config)
        shortlist = Shortlist.of(items, scorer.estimate(space), tokens, sizes, space, config)
    rows = scorer.score(shortlist.exact if shortlist else items)
    return merge(rows + shortlist.rows(rows) if shortlist else rows, config, artifact)
