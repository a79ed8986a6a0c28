"""The scoring stage on Ray: candidates enter a pipeline of shards at their layer's, so that all shards stay busy.

Text is read in chunks. All candidates run on one chunk before any runs on the next, so that a shard remembers the parent's activations
on a single chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from actors.parent_pipelines import ParentPipelines
from actors.parent_shard import EvaluationData
from actors.placement import runs
from actors.pool import Pool
from puzzle_ray.artifacts import ScoreRow, Scores, SearchSpace
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.data.order import Tokens
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.progress import Bar, Progress
from puzzle_ray.scoring import fisher
from puzzle_ray.scoring.downstream import load_questions
from puzzle_ray.scoring.plan import Chunk, chunk_limit_bytes, chunks_of_rounds, kept_bytes_per_token, shard_bytes
from puzzle_ray.scoring.replacements import (
    Damage,
    Replacement,
    ReplacementGroup,
    ScoringTask,
    all_replacements,
    keep,
    merge_scores,
    replacement_groups,
    saved_score_rows,
    unfinished_groups,
)
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.scoring.shortlist import Shortlist, footprints
from puzzle_ray.store import Artifact


@dataclass
class _Pipeline:
    """One whole parent, cut into shards. It works on one chunk of the text at a time."""

    shards: list[ActorHandle[Any]]
    shard_layers: list[range]
    data: ObjectRef[EvaluationData]
    batches: tuple[int, ...] = ()  # of the chunk
    entering: list[Any] = field(default_factory=list)  # per shard: the parent's activations at its border, on the chunk

    def room(self) -> ObjectRef[int | None]:
        """The least memory that is free on a shard's GPU."""
        least: Any = None
        for shard in self.shards:
            least = shard.room.remote(least)
        return least

    def _turn_to(self, batches: tuple[int, ...]) -> None:
        """Has every shard run the parent on a chunk, unless that is the one they work on."""
        if batches != self.batches:
            self.batches, self.entering = batches, [[]]
            for shard in self.shards:
                self.entering.append(shard.run_parent.remote(batches, self.data, self.entering[-1]))

    def score(self, task: ScoringTask, chunk: Chunk, library: Artifact) -> ObjectRef[list[list[Damage]]]:
        """Sends exchanges through; the reference is their damage."""
        self._turn_to(chunk.batches)
        first = next(n for n, layers in enumerate(self.shard_layers) if task.layer in layers)
        out = self.shards[first].exchange.remote(task, library, self.batches, self.data, self.entering[first])
        for n in range(first + 1, len(self.shards)):
            out = self.shards[n].suffix.remote(task, out, self.batches, self.data, self.entering[n])
        return out

    def estimate(
        self, chunk: Chunk, space: SearchSpace, config: ScoringConfig, library: Artifact
    ) -> list[tuple[tuple[int, ...], list[ObjectRef[fisher.Estimates]]]]:
        """Sends gradients back, from the last shard to the first, for a part of the chunk's batches after the other.

        Returns each part's batches, and references to the estimates of every shard. The very last one is there when all are.
        """
        self._turn_to(chunk.batches)
        parts = runs(len(chunk.batches), 2 * len(self.shards)) if len(self.shards) > 1 else [range(len(chunk.batches))]
        sent = []
        for part in parts:
            own = chunk.batches[part.start : part.stop]
            found, gradients = [], None
            for n in reversed(range(len(self.shards))):
                estimate = self.shards[n].estimate.options(num_returns=2)
                of_shard, gradients = estimate.remote(
                    own, gradients, space, config, library, self.batches, self.data, self.entering[n]
                )
                found.append(of_shard)
            sent.append((own, found))
        return sent


class _Pipelines:
    """The pipelines of one scoring, and how much text they work on at a time."""

    def __init__(self, parent: str, cluster: ClusterConfig, config: ScoringConfig, data: EvaluationData, limit: int) -> None:
        self.cluster, self.config, self.data = cluster, config, data
        self.sent: ObjectRef[EvaluationData] | None = None
        self.model_config = read_config(locate(parent))
        self.batch_tokens = [batch.size for batch in (*data.texts, *(q.input_ids for q in data.questions))]
        depth, descriptor = self.model_config.num_hidden_layers, describe(self.model_config)
        largest = max(self.batch_tokens)
        masked = 0 if data.separator is None else data.texts[0].shape[1]

        def held_bytes(layers: range) -> int:
            return shard_bytes(self.model_config, descriptor, layers, config, largest, None, masked).total

        def handle_of(shards: list[ActorHandle[Any]], layers: list[range]) -> _Pipeline:
            self.sent = self.sent or ray.put(data)
            return _Pipeline(shards, layers, self.sent)

        self.pipelines = ParentPipelines(
            parent, depth, cluster, "score", limit, held_bytes, handle_of, dtype=config.dtype, tf32=config.tf32
        )

    def pool(self) -> Pool[_Pipeline, Any]:
        return self.pipelines.pool()

    def chunks(self, rounds: Sequence[tuple[int, ...]]) -> list[Chunk]:
        """The batches of all rounds in chunks that every shard has room for."""
        free: list[int | None] = [None]
        if self.cluster.gpus_per_shard and self.config.chunk_mib == "auto":

            def receive(_: str, found: int | None) -> bool:
                free.append(found)
                return False

            self.pool().run(["room"], lambda pipeline, _: pipeline.room(), receive, name_of=str)
        self.pool()
        each = max(kept_bytes_per_token(self.model_config, own, self.config.dtype) for own in self.pipelines.layers)
        return chunks_of_rounds(rounds, self.batch_tokens, each, chunk_limit_bytes(self.config, free[-1]))

    def close(self) -> None:
        self.pipelines.close()


def _evaluation_data(parent: str, model_config: Any, config: ScoringConfig, tokens: Tokens, trusted: bool) -> EvaluationData:
    questions = load_questions(parent, config, model_config, trusted=trusted)
    sequences = config.micro_batch_tokens // tokens.sequences.shape[1]
    return EvaluationData([batch.numpy() for batch in tokens.first(config.tokens, sequences)], questions, tokens.separator)


def score_blocks(
    parent: str,
    space: SearchSpace,
    library: Artifact,
    config: ScoringConfig,
    cluster: ClusterConfig,
    tokens: Tokens,
    artifact: Artifact,
    progress: Progress,
    trusted: bool = False,
) -> Scores:
    """Scores every item that is not in the step yet. Raises ClusterError when shards cannot be placed or stop answering.

    `trusted`: the tokenizer's own code may run, for questions.
    """
    model_config = read_config(locate(parent))
    data = _evaluation_data(parent, model_config, config, tokens, trusted)
    items = all_replacements(space, config.granularity)
    wanted, shortlist = items, None
    pipelines = _Pipelines(parent, cluster, config, data, len(items))
    try:
        if config.shortlist == "fisher":
            missing = fisher.unestimated_batches(len(data.texts), artifact)
            if missing:
                _estimate_all(pipelines, missing, space, config, library, artifact)
            found = fisher.load_estimates([len(batch) for batch in data.texts], artifact)
            weights = footprints(space, describe(model_config), model_config)
            shortlist = Shortlist.of(items, found, sum(batch.size for batch in data.texts), weights, space, config)
            wanted = list(shortlist.exact)
        rows = _score(pipelines, wanted, config, library, artifact, progress)
    finally:
        pipelines.close()
    return merge_scores(rows + shortlist.rows(rows) if shortlist else rows, config, artifact)


@contextmanager
def scoring(
    parent: str,
    space: SearchSpace,
    library: Artifact,
    config: ScoringConfig,
    cluster: ClusterConfig,
    tokens: Tokens,
    artifact: Artifact,
    progress: Progress,
    trusted: bool = False,
) -> Iterator[Callable[[Sequence[Replacement]], list[ScoreRow]]]:
    """A function that scores items exactly, one at a time, as they are asked for; what it found is kept in the step."""
    data = _evaluation_data(parent, read_config(locate(parent)), config, tokens, trusted)
    pipelines = _Pipelines(parent, cluster, config, data, len(all_replacements(space, config.granularity)))
    try:
        yield lambda items: _score(pipelines, items, config.alone, library, artifact, progress)
    finally:
        pipelines.close()


def _score(
    pipelines: _Pipelines,
    wanted: Sequence[Replacement],
    config: ScoringConfig,
    library: Artifact,
    artifact: Artifact,
    progress: Progress,
) -> list[ScoreRow]:
    """The rows of items, those that are not in the step yet scored first."""
    todo = unfinished_groups(
        replacement_groups(wanted, config, len(pipelines.data.texts), len(pipelines.data.questions)), artifact
    )
    with progress.stage("score", len(wanted), "block") as bar:
        bar.advance(len(wanted) - sum(len(group.replacements) for group in todo))
        for chunk in pipelines.chunks(todo[0].rounds) if todo else ():
            _score_chunk(pipelines.pool(), chunk, todo, library, artifact, bar)
    return saved_score_rows(wanted, artifact)


def _score_chunk(
    pool: Pool[_Pipeline, ReplacementGroup],
    chunk: Chunk,
    todo: Sequence[ReplacementGroup],
    library: Artifact,
    artifact: Artifact,
    bar: Bar,
) -> None:
    tasks = {group.replacements: task for group in todo if (task := group.task(chunk)) is not None}

    def send(pipeline: _Pipeline, group: ReplacementGroup) -> ObjectRef[list[list[Damage]]]:
        return pipeline.score(tasks[group.replacements], chunk, library)

    def receive(group: ReplacementGroup, found: list[list[Damage]]) -> bool:
        task = tasks[group.replacements]
        group.add(task, found)
        bar.advance(keep(group, task, artifact))
        return False

    groups = [group for group in todo if group.replacements in tasks]
    pool.run(groups, send, receive, name_of=lambda group: group.replacements[0].file_name)


def _estimate_all(
    pipelines: _Pipelines,
    missing: Sequence[int],
    space: SearchSpace,
    config: ScoringConfig,
    library: Artifact,
    artifact: Artifact,
) -> None:
    pool: Pool[_Pipeline, Chunk] = pipelines.pool()
    sent: dict[Chunk, list[tuple[tuple[int, ...], list[ObjectRef[fisher.Estimates]]]]] = {}

    def send(pipeline: _Pipeline, chunk: Chunk) -> ObjectRef[fisher.Estimates]:
        sent[chunk] = pipeline.estimate(chunk, space, config, library)
        return sent[chunk][-1][1][-1]

    def receive(chunk: Chunk, _: fisher.Estimates) -> bool:
        for batches, of_shards in sent.pop(chunk):
            fisher.save_estimates(artifact, batches, ray.get(of_shards, timeout=pool.terms.step_timeout_s))
        return False

    pool.run(pipelines.chunks([tuple(missing)]), send, receive, name_of=lambda chunk: f"text batch {chunk.batches[0]}")
