"""Whole children measured on Ray: pipelines of shards hold the parent, and exchange its blocks for the library's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from actors.parent_pipelines import ParentPipelines
from actors.pool import Pool
from actors.transport import Container
from puzzle_ray.artifacts import Choices, Measured
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.evaluation.child_meter import KEPT_BYTES
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.progress import Progress
from puzzle_ray.scoring.plan import shard_bytes
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.store import Artifact


@dataclass
class _Pipeline:
    """One whole parent, cut into shards."""

    shards: list[ActorHandle[Any]]
    library: Artifact
    batches: ObjectRef[list[Container]]
    separator: int | None
    entering: list[Any] = field(default_factory=list)  # per shard: the parent's hidden states at its border

    def measure(self, choices: Choices) -> ObjectRef[Measured]:
        """Sends a child through; the reference is what was measured."""
        if not self.entering:
            self.entering = [[]]
            for shard in self.shards:
                parent = (self.library, self.batches, self.entering[-1], self.separator)
                self.entering.append(shard.remember_parent.remote(*parent))
        out: Any = []
        for shard, parent_entering in zip(self.shards, self.entering, strict=False):
            out = shard.run_child.remote(choices, out, self.library, self.batches, parent_entering, self.separator)
        measured: ObjectRef[Measured] = out
        return measured


def file_name(choices: Choices) -> str:
    """Of a child's measurement in the step."""
    labels = ", ".join(choice.label for choice in choices)
    return f"children/{hashlib.sha256(labels.encode()).hexdigest()[:20]}.json"


class ChildMeters:
    """Measures children that the step has no file of yet; shards start when the first is met."""

    def __init__(
        self,
        parent: str,
        library: Artifact,
        batches: Sequence[Container],
        cluster: ClusterConfig,
        artifact: Artifact,
        progress: Progress,
        dtype: str = "float32",
        tf32: bool = False,
        separator: int | None = None,
    ) -> None:
        self.parent, self.library, self.batches = parent, library, list(batches)
        self.cluster, self.artifact, self.progress = cluster, artifact, progress
        self.dtype, self.tf32, self.separator = dtype, tf32, separator
        self.pipelines: ParentPipelines[_Pipeline] | None = None

    def __call__(self, children: Sequence[Choices]) -> list[Measured]:
        """In the order asked for. Raises ClusterError when shards cannot be placed or stop answering."""
        todo = [c for c in dict.fromkeys(children) if not self.artifact.exists(file_name(c))]
        if todo:
            self._measure(self._started(len(todo)).pool(), todo)
        return [Measured(**self.artifact.read_json(file_name(c))["measured"]) for c in children]

    def _started(self, limit: int) -> ParentPipelines[_Pipeline]:
        """Pipelines for as many children at a time as there is room for, up to `limit`."""
        if self.pipelines is None:
            config = read_config(locate(self.parent))
            descriptor, tokens = describe(config), max((batch.size for batch in self.batches), default=1)
            how = ScoringConfig.model_validate({"dtype": self.dtype})
            masked = 0 if self.separator is None else max((batch.shape[1] for batch in self.batches), default=0)
            ids = ray.put(self.batches)

            def held_bytes(layers: range) -> int:
                held = shard_bytes(config, descriptor, layers, how, tokens, None, masked)
                return held.total + KEPT_BYTES

            self.pipelines = ParentPipelines(
                self.parent,
                config.num_hidden_layers,
                self.cluster,
                "search",
                limit,
                held_bytes,
                lambda shards, _: _Pipeline(shards, self.library, ids, self.separator),
                dtype=self.dtype,
                tf32=self.tf32,
            )
        self.pipelines.limit = max(self.pipelines.limit, limit)
        return self.pipelines

    def _measure(self, pool: Pool[_Pipeline, Choices], todo: Sequence[Choices]) -> None:
        with self.progress.stage("measure", len(todo), "child") as bar:

            def receive(choices: Choices, measured: Measured) -> bool:
                labels = [choice.label for choice in choices]
                self.artifact.write_json(file_name(choices), {"choices": labels, "measured": asdict(measured)})
                bar.advance()
                return False

            pool.run(todo, lambda pipeline, choices: pipeline.measure(choices), receive, name_of=file_name)

    def close(self) -> None:
        if self.pipelines is not None:
            self.pipelines.close()
            self.pipelines = None


@contextmanager
def measuring(
    parent: str,
    library: Artifact,
    batches: Sequence[Container],
    cluster: ClusterConfig,
    artifact: Artifact,
    progress: Progress,
    dtype: str = "float32",
    tf32: bool = False,
    separator: int | None = None,
) -> Iterator[ChildMeters]:
    """Meters for as long as they are needed. They compute as blocks are scored: see `scoring.dtype` and `scoring.tf32`.

    `separator` is as of `puzzle_ray.evaluation.child_meter.ShardMeter`.
    """
    meters = ChildMeters(parent, library, batches, cluster, artifact, progress, dtype, tf32, separator)
    try:
        yield meters
    finally:
        meters.close()
