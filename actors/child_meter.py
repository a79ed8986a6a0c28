"""Whole children measured on Ray: every worker holds the parent once and exchanges its blocks for the library's."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.memory import weight_bytes, with_memory
from actors.names import actor_name
from actors.placement import require
from actors.pool import Pool, Terms
from actors.transport import Container
from puzzle_ray.artifacts import Choices, Measured
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.progress import Progress
from puzzle_ray.store import Artifact

FLOAT32_BYTES = 4


class Meter:
    """A whole parent, and the library's blocks as they are asked for."""

    def __init__(self, parent: str, library: Artifact, num_threads: int, num_gpus: float = 0) -> None:
        import torch

        from puzzle_ray.models.blocks import load_stack
        from puzzle_ray.models.child import read_config
        from puzzle_ray.models.describe import describe
        from puzzle_ray.process import compute_with, device_for

        compute_with(num_threads)
        device = device_for(num_gpus)
        folder = locate(parent)
        config = read_config(folder)
        self.library = library
        depth = config.num_hidden_layers
        self.stack = load_stack(folder, describe(config), config, 0, depth, torch.float32, device=device)
        self.meter: Any = None

    def __repr__(self) -> str:
        return f"ChildMeter({self.stack.last - self.stack.first} layers)"

    def node(self) -> str:
        """The id of the node this runs on."""
        return ray.get_runtime_context().get_node_id()

    def measure(self, choices: Choices, batches: Sequence[Container]) -> Measured:
        """`batches` are the same in every call; a process that was restarted runs the parent on them again."""
        import torch

        from puzzle_ray.distill.library import Library
        from puzzle_ray.evaluation.child_meter import ChildMeter

        if self.meter is None:
            self.meter = ChildMeter(self.stack, Library(self.library), [torch.from_numpy(batch.copy()) for batch in batches])
        measured: Measured = self.meter.measure(choices)
        return measured


@ray.remote(max_restarts=0)  # the pool starts another, and measuring again gives the same
class MeterActor(Meter):
    """A meter as an actor."""


def file_name(choices: Choices) -> str:
    """Of a child's measurement in the step."""
    labels = ", ".join(choice.label for choice in choices)
    return f"children/{hashlib.sha256(labels.encode()).hexdigest()[:20]}.json"


class ChildMeters:
    """Measures children that the step has no file of yet; workers start when the first is met."""

    def __init__(
        self,
        parent: str,
        library: Artifact,
        batches: Sequence[Container],
        cluster: ClusterConfig,
        artifact: Artifact,
        progress: Progress,
    ) -> None:
        self.parent, self.library, self.batches = parent, library, list(batches)
        self.cluster, self.artifact, self.progress = cluster, artifact, progress
        self.pool: Pool[ActorHandle[Any], Choices] | None = None
        self.room = 0

    def __call__(self, children: Sequence[Choices]) -> list[Measured]:
        """In the order asked for. Raises ClusterError when workers cannot be placed or stop answering."""
        todo = [c for c in dict.fromkeys(children) if not self.artifact.exists(file_name(c))]
        if todo:
            self._measure(self._started(len(todo)), todo)
        return [Measured(**self.artifact.read_json(file_name(c))["measured"]) for c in children]

    def _started(self, limit: int) -> Pool[ActorHandle[Any], Choices]:
        """As many workers as there is room for, up to `limit`. Each holds the whole parent: the GPU shares of all its shards, or a CPU."""
        if self.pool is None:
            gpus = self.cluster.num_shards * self.cluster.gpus_per_shard
            if gpus > 1:
                gpus = 0
                words = "  measure: a whole parent takes more than one GPU; children are measured on CPUs"
                print(words, file=sys.stderr, flush=True)
            options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus}
            if not gpus:
                options = with_memory(options, weight_bytes(locate(self.parent), FLOAT32_BYTES), "a children's meter", "measure")
            self.room = require(options, "a children's meter", "search", self.cluster.autoscaling) or 1
            terms = Terms("search", "children's meters", self.cluster.placement_timeout_s, self.cluster.step_timeout_s)

            def start_one() -> tuple[ActorHandle[Any], list[ActorHandle[Any]]]:
                named = MeterActor.options(**options, **actor_name("children's meter"))  # type: ignore[attr-defined]
                meter = named.remote(self.parent, self.library, 1, gpus)
                return meter, [meter]

            self.pool = Pool(start_one, terms)
        self.pool.start(max(0, min(self.room, limit) - len(self.pool.workers)))
        return self.pool

    def _measure(self, pool: Pool[ActorHandle[Any], Choices], todo: Sequence[Choices]) -> None:
        batches = ray.put(self.batches)
        with self.progress.stage("measure", len(todo), "child") as bar:

            def receive(choices: Choices, measured: Measured) -> bool:
                labels = [choice.label for choice in choices]
                self.artifact.write_json(file_name(choices), {"choices": labels, "measured": asdict(measured)})
                bar.advance()
                return False

            pool.run(todo, lambda meter, choices: meter.measure.remote(choices, batches), receive, name_of=file_name)

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
            self.pool = None


@contextmanager
def measuring(
    parent: str, library: Artifact, batches: Sequence[Container], cluster: ClusterConfig, artifact: Artifact, progress: Progress
) -> Iterator[ChildMeters]:
    """Meters for as long as they are needed."""
    meters = ChildMeters(parent, library, batches, cluster, artifact, progress)
    try:
        yield meters
    finally:
        meters.close()
