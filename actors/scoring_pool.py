"""The scoring stage on Ray: candidates enter a pipeline of shards at their layer's, so that all shards stay busy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from actors.parent_shard import EvaluationData, ParentShard, environment
from actors.placement import cluster_cpus, end, require, runs, wait_ready
from puzzle_ray.artifacts import ScoreRow, Scores, SearchSpace
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.data.order import Tokens
from puzzle_ray.errors import ClusterError
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

Work = TypeVar("Work")


@dataclass
class _Pipeline:
    """One whole parent, cut into shards."""

    shards: list[ActorHandle[Any]]
    shard_layers: list[range]
    data: ObjectRef[EvaluationData]
    entering: list[Any]  # per shard: the parent's activations at its border

    @classmethod
    def start(cls, parent: str, num_layers: int, cluster: ClusterConfig, data: ObjectRef[EvaluationData]) -> _Pipeline:
        layers = runs(num_layers, cluster.num_shards)
        share = 1 / -(-len(layers) // cluster_cpus())  # more shards than cores take turns; whole shares of every core
        options = {"num_cpus": share, "num_gpus": cluster.gpus_per_shard, "runtime_env": environment(1)}
        how = ("float32", "float32", 1, cluster.transport, cluster.gpus_per_shard)
        shards = [ParentShard.options(**options).remote(parent, r.start, r.stop, *how) for r in layers]  # type: ignore[attr-defined]
        entering: list[Any] = [[]]
        for shard in shards:
            entering.append(shard.run_parent.remote(data, entering[-1]))
        return cls(shards, layers, data, entering)

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


class _Pool(Generic[Work]):
    """Keeps every pipeline as full as it can be, and hands out what comes back."""

    def __init__(self, pipelines: Sequence[_Pipeline], timeout_s: float) -> None:
        self.pipelines, self.timeout_s = pipelines, timeout_s
        self.running: dict[ObjectRef[Any], tuple[Work, _Pipeline]] = {}

    def run(
        self,
        waiting: Sequence[Work],
        send: Callable[[_Pipeline, Work], ObjectRef[Any] | None],
        receive: Callable[[Work, ObjectRef[Any]], None],
    ) -> None:
        """`send` returns the reference to wait for, or None when there is nothing more to do for this work."""
        left = list(reversed(waiting))

        def start(pipeline: _Pipeline, work: Work | None) -> None:
            while work is not None:
                reference = send(pipeline, work)
                if reference is not None:
                    self.running[reference] = (work, pipeline)
                    return
                work = left.pop() if left else None

        for _ in range(2 * len(self.pipelines[0].shards)):  # enough that no shard waits for work
            for pipeline in self.pipelines:
                start(pipeline, left.pop() if left else None)
        while self.running:
            done, _ = ray.wait(list(self.running), num_returns=1, timeout=self.timeout_s)
            if not done:
                raise ClusterError("score", f"no block was scored within {self.timeout_s:g} s", "raise cluster.step_timeout_s")
            work, pipeline = self.running.pop(done[0])
            receive(work, done[0])
            start(pipeline, work)


class _Pipelines:
    """As many whole parents as the cluster has room for, started when the first work is met."""

    def __init__(self, parent: str, num_layers: int, cluster: ClusterConfig, data: EvaluationData, most: int) -> None:
        self.parent, self.num_layers, self.cluster, self.data, self.most = parent, num_layers, cluster, data, most
        self.running: list[_Pipeline] = []

    @property
    def shards(self) -> list[ActorHandle[Any]]:
        return [shard for pipeline in self.running for shard in pipeline.shards]

    def pool(self) -> _Pool[Any]:
        if not self.running:
            room, cluster = cluster_cpus(), self.cluster
            if cluster.gpus_per_shard:
                wanted = {"num_gpus": cluster.gpus_per_shard}
                gpus = require(wanted, "a parent shard", "scoring", cluster.autoscaling) or cluster.num_shards
                cluster = cluster.model_copy(update={"num_shards": min(cluster.num_shards, gpus)})
                room = min(room, gpus)
            reference = ray.put(self.data)
            for _ in range(min(self.most, max(1, room // cluster.num_shards))):
                self.running.append(_Pipeline.start(self.parent, self.num_layers, cluster, reference))
            wait_ready(self.shards, "parent shards", self.cluster.placement_timeout_s)
        return _Pool(self.running, self.cluster.step_timeout_s)


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
        end(pipelines.shards)
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
    alone = config.model_copy(update={"candidate_batch": 1})  # whom an item would share a batch with depends on who asks
    try:
        yield lambda items: _score(pipelines, items, alone, library, artifact, progress)
    finally:
        end(pipelines.shards)


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
    pool: _Pool[ReplacementGroup], todo: Sequence[ReplacementGroup], library: Artifact, artifact: Artifact, bar: Bar
) -> None:
    tasks: dict[tuple[Replacement, ...], ScoringTask] = {}

    def send(pipeline: _Pipeline, group: ReplacementGroup) -> ObjectRef[list[Damage]] | None:
        task = group.next_task()
        if task is None:
            group.save(artifact)
            bar.advance(len(group.replacements))
            return None
        tasks[group.replacements] = task
        return pipeline.score(task, library)

    def receive(group: ReplacementGroup, reference: ObjectRef[list[Damage]]) -> None:
        group.add(tasks[group.replacements], ray.get(reference, timeout=pool.timeout_s))

    pool.run(todo, send, receive)


def _estimate_all(
    pool: _Pool[tuple[str, tuple[int, ...]]],
    todo: Sequence[tuple[str, tuple[int, ...]]],
    space: SearchSpace,
    config: ScoringConfig,
    library: Artifact,
    artifact: Artifact,
) -> None:
    sent: dict[str, list[ObjectRef[fisher.Estimates]]] = {}

    def send(pipeline: _Pipeline, work: tuple[str, tuple[int, ...]]) -> ObjectRef[fisher.Estimates] | None:
        name, batches = work
        if name in sent:
            return None
        sent[name] = pipeline.estimate(batches, space, config, library)
        return sent[name][-1]  # the first shard's: the others are there when it is

    def receive(work: tuple[str, tuple[int, ...]], reference: ObjectRef[fisher.Estimates]) -> None:
        fisher.save_estimates(artifact, work[0], ray.get(sent[work[0]], timeout=pool.timeout_s))

    pool.run(todo, send, receive)
