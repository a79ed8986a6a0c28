"""The scoring stage in one process, without Ray."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from puzzle_ray.artifacts import ScoreRow, Scores, SearchSpace
from puzzle_ray.models.blocks import LayerStack
from puzzle_ray.process import free_bytes
from puzzle_ray.progress import Progress
from puzzle_ray.scoring import fisher
from puzzle_ray.scoring.downstream import QuestionBatch
from puzzle_ray.scoring.plan import Chunk, chunk_limit_bytes, chunks_of_rounds, kept_bytes_per_token
from puzzle_ray.scoring.replacements import (
    Replacement,
    all_replacements,
    keep,
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
    """Scores replacements in this process. `stack` holds the whole parent; `texts` and `separator` are as of `ShardScorer`.

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
        separator: int | None = None,
    ) -> None:
        self.config, self.artifact, self.states_of, self.progress = config, artifact, states_of, progress
        self.texts, self.questions = texts, questions
        self.shard = ShardScorer(stack, texts, questions, separator)

    def chunks(self, rounds: Sequence[tuple[int, ...]]) -> list[Chunk]:
        """The batches of all rounds in chunks that this process has room for."""
        stack = self.shard.stack
        dtype = str(stack.dtype).removeprefix("torch.")
        each = kept_bytes_per_token(stack.config, range(stack.first, stack.last), dtype)
        return chunks_of_rounds(rounds, self.shard.batch_tokens, each, chunk_limit_bytes(self.config, free_bytes(stack.device)))

    def _remember(self, batches: Sequence[int]) -> None:
        if not self.shard.remembers(batches):
            self.shard.run_parent(batches=batches)

    def score(self, replacements: Sequence[Replacement], config: ScoringConfig | None = None) -> list[ScoreRow]:
        """The rows of these replacements. Those that are not in the artifact yet are scored first."""
        groups = replacement_groups(replacements, config or self.config, len(self.texts), len(self.questions))
        unfinished = unfinished_groups(groups, self.artifact)
        with self.progress.stage("score", len(replacements), "block") as bar:
            bar.advance(len(replacements) - sum(len(group.replacements) for group in unfinished))
            for chunk in self.chunks(groups[0].rounds) if unfinished else ():
                tasks = [(group, task) for group in unfinished if (task := group.task(chunk)) is not None]
                for group, task in tasks:
                    self._remember(chunk.batches)
                    group.add(task, self.shard.measure(task, self.shard.run_replacements(task, self.states_of)))
                    bar.advance(keep(group, task, self.artifact))
        return saved_score_rows(replacements, self.artifact)

    def score_alone(self, replacements: Sequence[Replacement]) -> list[ScoreRow]:
        """The same, with every replacement in a batch of its own and on all text: see `ScoringConfig.alone`."""
        return self.score(replacements, self.config.alone)

    def estimate(self, space: SearchSpace) -> fisher.Estimates:
        """The Fisher estimates of all replacements. Those that are not in the artifact yet are computed first."""
        missing = fisher.unestimated_batches(len(self.texts), self.artifact)
        for chunk in self.chunks([tuple(missing)]):
            self._remember(chunk.batches)
            estimates, _ = fisher.shard_estimates(self.shard, chunk.batches, None, space, self.config, self.states_of)
            fisher.save_estimates(self.artifact, chunk.batches, [estimates])
        return fisher.load_estimates([len(ids) for ids in self.texts], self.artifact)


def score_serially(
    stack: LayerStack,
    texts: Sequence[Tensor],
    space: SearchSpace,
    config: ScoringConfig,
    artifact: Artifact,
    states_of: StatesOf,
    progress: Progress,
    questions: Sequence[QuestionBatch] = (),
    separator: int | None = None,
) -> Scores:
    """The scoring stage in this process. `stack` holds the whole parent; `texts` and `separator` are as of `ShardScorer`."""
    replacements = all_replacements(space, config.granularity)
    scorer = SerialScorer(stack, texts, config, artifact, states_of, progress, questions, separator)
    shortlist = None
    if config.shortlist == "fisher":
        tokens = sum(ids.numel() for ids in texts)
        sizes = footprints(space, stack.descriptor, stack.config)
        shortlist = Shortlist.of(replacements, scorer.estimate(space), tokens, sizes, space, config)
    rows = scorer.score(shortlist.exact if shortlist else replacements)
    return merge_scores(rows + shortlist.rows(rows) if shortlist else rows, config, artifact)
