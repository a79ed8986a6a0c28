"""The scoring stage on Ray: candidates enter a pipeline of shards at their layer's, so that all shards stay busy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from actors.parent_shard import ParentShard, environment
from actors.placement import cluster_cpus, end, runs, wait_ready
from puzzle_ray.artifacts import ScoreRow, Scores, SearchSpace
from puzzle_ray.config import ClusterConfig, ScoringConfig
from puzzle_ray.data import Tokens
from puzzle_ray.errors import ClusterError
from puzzle_ray.progress import Progress
from puzzle_ray.scoring.replace_one import Item, merge, plan, save_item, unfinished
from puzzle_ray.store import Step


@dataclass
class _Pipeline:
    """One whole parent, cut into shards."""

    shards: list[ActorHandle[Any]]
    shard_layers: list[range]
    ids: ObjectRef[Any]
    entering: list[Any]  # per shard: the parent's activations at its border

    @classmethod
    def start(cls, parent: str, num_layers: int, cluster: ClusterConfig, ids: ObjectRef[Any]) -> _Pipeline:
        layers = runs(num_layers, cluster.num_shards)
        options = {"num_cpus": 1, "num_gpus": cluster.gpus_per_shard, "runtime_env": environment(1)}
        shards = [
            ParentShard.options(**options).remote(parent, r.start, r.stop, "float32", "float32", 1)  # type: ignore[attr-defined]
            for r in layers
        ]
        entering: list[Any] = [[]]
        for shard in shards:
            entering.append(shard.run_parent.remote(ids, entering[-1]))
        return cls(shards, layers, ids, entering)

    def score(self, item: Item, library: Step) -> ObjectRef[list[ScoreRow]]:
        """Sends one exchange through; the reference is its rows."""
        first = next(n for n, layers in enumerate(self.shard_layers) if item.layer in layers)
        out = self.shards[first].exchange.remote(item, library, self.ids, self.entering[first])
        for n in range(first + 1, len(self.shards)):
            out = self.shards[n].suffix.remote(item, out, self.ids, self.entering[n])
        return out


def score_blocks(
    parent: str,
    space: SearchSpace,
    library: Step,
    config: ScoringConfig,
    cluster: ClusterConfig,
    tokens: Tokens,
    step: Step,
    progress: Progress,
) -> Scores:
    """Scores every item that is not in the step yet. Raises ClusterError when shards cannot be placed or stop answering."""
    items = plan(space, config.granularity)
    todo = unfinished(items, step)
    if todo:
        sequences = config.micro_batch_tokens // tokens.sequences.shape[1]
        batches = [batch.numpy() for batch in tokens.first(config.tokens, sequences)]
        replicas = max(1, min(len(todo), cluster_cpus() // cluster.num_shards))
        ids = ray.put(batches)
        pipelines = [_Pipeline.start(parent, len(space.layers), cluster, ids) for _ in range(replicas)]
        shards = [shard for pipeline in pipelines for shard in pipeline.shards]
        try:
            wait_ready(shards, "parent shards", cluster.placement_timeout_s)
            with progress.stage("score", len(items), "block") as bar:
                bar.advance(len(items) - len(todo))
                _score_all(pipelines, todo, library, step, cluster, bar)
        finally:
            end(shards)
    return merge(items, config, step)


def _score_all(
    pipelines: Sequence[_Pipeline], todo: Sequence[Item], library: Step, step: Step, cluster: ClusterConfig, bar: Any
) -> None:
    waiting = list(reversed(todo))
    running: dict[ObjectRef[list[ScoreRow]], tuple[Item, _Pipeline]] = {}
    for pipeline in pipelines:
        for _ in range(2 * len(pipeline.shards)):  # enough that no shard waits for work
            if waiting:
                item = waiting.pop()
                running[pipeline.score(item, library)] = (item, pipeline)
    while running:
        done, _ = ray.wait(list(running), num_returns=1, timeout=cluster.step_timeout_s)
        if not done:
            raise ClusterError(
                "score", f"no block was scored within {cluster.step_timeout_s:g} s", "raise cluster.step_timeout_s"
            )
        item, pipeline = running.pop(done[0])
        save_item(step, item, ray.get(done[0], timeout=cluster.step_timeout_s))
        bar.advance()
        if waiting:
            following = waiting.pop()
            running[pipeline.score(following, library)] = (following, pipeline)
