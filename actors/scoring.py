"""The scoring stage on Ray: candidates enter a pipeline of shards at their layer's, so that all shards stay busy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from actors.memory import weight_bytes, with_memory
from actors.names import actor_name, layers_in_words
from actors.parent_shard import EvaluationData, ParentShard
from actors.placement import cluster_cpus, places, require, runs
from actors.pool import Pool, Terms
from puzzle_ray.artifacts import ScoreRow, Scores, SearchSpace
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.data.order import Tokens
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.progress import Bar, Progress
from puzzle_ray.scoring import fisher
from puzzle_ray.scoring.downstream import load_questions
from puzzle_ray.scoring.replacements import (
    Damage,
    Replacement,
    ReplacementGroup,
    ScoringTask,
    all_replacements,
    merge_scores,
    replacement_groups,
    saved_score_rows,
    unfinished_groups,
)
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.scoring.shortlist import Shortlist, footprints
from puzzle_ray.store import Artifact

FLOAT32_BYTES = 4


@dataclass
class _Pipeline:
    """One whole parent, cut into shards."""

    shards: list[ActorHandle[Any]]
    shard_layers: list[range]
    data: ObjectRef[EvaluationData]
    entering: list[Any]  # per shard: the parent's activations at its border

    @classmethod
    def start(
        cls, parent: str, layers: list[range], cluster: ClusterConfig, options: Mapping[str, Any], data: ObjectRef[EvaluationData]
    ) -> tuple[_Pipeline, Sequence[ActorHandle[Any]]]:
        """Asks Ray for the shards, and has each run the parent first."""
        how = ("float32", "float32", 1, cluster.transport, cluster.gpus_per_shard)
        actor: Any = ParentShard
        named = [actor_name(f"scoring shard, {layers_in_words(own)}") for own in layers]
        shards = [
            actor.options(**options, **n).remote(parent, own.start, own.stop, *how) for own, n in zip(layers, named, strict=True)
        ]
        entering: list[Any] = [[]]
        for shard in shards:
            entering.append(shard.run_parent.remote(data, entering[-1]))
        return cls(shards, layers, data, entering), shards

    def score(self, task: ScoringTask, library: Artifact) -> ObjectRef[list[Damage]]:
        """Sends exchanges through; the reference is their damage."""
        first = next(n for n, layers in enumerate(self.shard_layers) if task.layer in layers)
        out = self.shards[first].exchange.remote(task, library, self.data, self.entering[first])
        for n in range(first + 1, len(self.shards)):
            out = self.shards[n].suffix.remote(task, out, self.data, self.entering[n])
        return out

    def estimate(
        self, batches: Sequence[int], space: SearchSpace, config: ScoringConfig, library: Artifact
    ) -> list[ObjectRef[fisher.Estimates]]:
        """Sends gradients back, from the last shard to the first; the references are each shard's estimates, the first one's last."""
        found, gradients = [], None
        for n in reversed(range(len(self.shards))):
            estimate = self.shards[n].estimate.options(num_returns=2)
            own, gradients = estimate.remote(batches, gradients, space, config, library, self.data, self.entering[n])
            found.append(own)
        return found


class _Pipelines:
    """As many whole parents as the cluster has room for, up to `limit`; started when the first work is met."""

    def __init__(self, parent: str, num_layers: int, cluster: ClusterConfig, data: EvaluationData, limit: int) -> None:
        self.parent, self.num_layers, self.cluster, self.data, self.limit = parent, num_layers, cluster, data, limit
        self.started: Pool[_Pipeline, Any] | None = None

    def pool(self) -> Pool[_Pipeline, Any]:
        """The pipelines, started by the first who asks. Each has enough work on its way that no shard waits for some."""
        if self.started is None:
            room, cluster = cluster_cpus(), self.cluster
            if cluster.gpus_per_shard:
                wanted = {"num_gpus": cluster.gpus_per_shard}
                gpus = require(wanted, "a parent shard", "scoring", cluster.autoscaling) or cluster.num_shards
                cluster = cluster.model_copy(update={"num_shards": min(cluster.num_shards, gpus)})
                room = min(room, gpus)
            layers = runs(self.num_layers, cluster.num_shards)
            folder = locate(self.parent)
            held = max(weight_bytes(folder, FLOAT32_BYTES, own) for own in layers)
            share = 1 / -(-len(layers) // cluster_cpus())  # more shards than cores share them; whole shares of every core
            options = {"num_cpus": share, "num_gpus": cluster.gpus_per_shard}
            if not cluster.gpus_per_shard:  # else the weights are in a GPU's memory
                options = with_memory(options, held, "a parent shard", "score", len(layers))
                room = min(room, places({"memory": options["memory"]})) if "memory" in options else room
            data = ray.put(self.data)
            terms = Terms("score", "parent shards", cluster.placement_timeout_s, cluster.step_timeout_s)
            self.started = Pool(
                lambda: _Pipeline.start(self.parent, layers, cluster, options, data),
                terms,
                depth=2 * len(layers),
                restarts=True,
            )
            self.started.start(min(self.limit, max(1, room // cluster.num_shards)))
        return self.started

    def close(self) -> None:
        if self.started is not None:
            self.started.close()
            self.started = None


def _evaluation_data(parent: str, model_config: Any, config: ScoringConfig, tokens: Tokens) -> EvaluationData:
    questions = load_questions(parent, config, getattr(model_config, "max_position_embeddings", None))
    sequences = config.micro_batch_tokens // tokens.sequences.shape[1]
    return EvaluationData([batch.numpy() for batch in tokens.first(config.tokens, sequences)], questions)


def score_blocks(
    parent: str,
    space: SearchSpace,
    library: Artifact,
    config: ScoringConfig,
    cluster: ClusterConfig,
    tokens: Tokens,
    artifact: Artifact,
    progress: Progress,
) -> Scores:
    """Scores every item that is not in the step yet. Raises ClusterError when shards cannot be placed or stop answering."""
    model_config = read_config(locate(parent))
    data = _evaluation_data(parent, model_config, config, tokens)
    items = all_replacements(space, config.granularity)
    num_texts = len(data.texts)
    estimates = fisher.unfinished_estimate_tasks(num_texts, artifact) if config.shortlist == "fisher" else []
    wanted, shortlist = items, None
    pipelines = _Pipelines(parent, len(space.layers), cluster, data, len(items))
    try:
        if estimates:
            _estimate_all(pipelines.pool(), estimates, space, config, library, artifact)
        if config.shortlist == "fisher":
            found = fisher.load_estimates(num_texts, artifact)
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
) -> Iterator[Callable[[Sequence[Replacement]], list[ScoreRow]]]:
    """A function that scores items exactly, one at a time, as they are asked for; what it found is kept in the step."""
    data = _evaluation_data(parent, read_config(locate(parent)), config, tokens)
    pipelines = _Pipelines(parent, len(space.layers), cluster, data, len(all_replacements(space, config.granularity)))
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
        if todo:
            _score_all(pipelines.pool(), todo, library, artifact, bar)
    return saved_score_rows(wanted, artifact)


def _score_all(
    pool: Pool[_Pipeline, ReplacementGroup], todo: Sequence[ReplacementGroup], library: Artifact, artifact: Artifact, bar: Bar
) -> None:
    tasks: dict[tuple[Replacement, ...], ScoringTask] = {}

    def send(pipeline: _Pipeline, group: ReplacementGroup) -> ObjectRef[list[Damage]]:
        return pipeline.score(tasks[group.replacements], library)

    def receive(group: ReplacementGroup, found: list[Damage]) -> bool:
        group.add(tasks[group.replacements], found)
        task = group.next_task()
        if task is not None:
            tasks[group.replacements] = task
            return True
        group.save(artifact)
        bar.advance(len(group.replacements))
        return False

    for group in todo:
        task = group.next_task()
        assert task is not None, "a group that is not in the step yet has something to score"
        tasks[group.replacements] = task
    pool.run(todo, send, receive, name_of=lambda group: group.replacements[0].file_name)


def _estimate_all(
    pool: Pool[_Pipeline, tuple[str, tuple[int, ...]]],
    todo: Sequence[tuple[str, tuple[int, ...]]],
    space: SearchSpace,
    config: ScoringConfig,
    library: Artifact,
    artifact: Artifact,
) -> None:
    sent: dict[str, list[ObjectRef[fisher.Estimates]]] = {}

    def send(pipeline: _Pipeline, work: tuple[str, tuple[int, ...]]) -> ObjectRef[fisher.Estimates]:
        name, batches = work
        sent[name] = pipeline.estimate(batches, space, config, library)
        return sent[name][-1]  # the first shard's: the others are there when it is

    def receive(work: tuple[str, tuple[int, ...]], _: fisher.Estimates) -> bool:
        fisher.save_estimates(artifact, work[0], ray.get(sent[work[0]], timeout=pool.terms.step_timeout_s))
        return False

    pool.run(todo, send, receive, name_of=lambda work: work[0])
