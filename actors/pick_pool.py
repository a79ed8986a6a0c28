"""Whole children measured on Ray: every worker holds the parent once and exchanges its blocks for the library's."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from actors.parent_shard import environment
from actors.placement import end, require, wait_ready
from actors.transport import Container
from puzzle_ray.artifacts import Choices, Measured
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.errors import ClusterError
from puzzle_ray.progress import Progress
from puzzle_ray.store import Artifact


class Meter:
    """A whole parent, and the library's blocks as they are asked for."""

    def __init__(self, parent: str, library: Artifact, num_threads: int, num_gpus: float = 0) -> None:
        import torch

        from puzzle_ray.models.blocks import load_stack
        from puzzle_ray.models.checkpoint import locate
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

    def pid(self) -> int:
        return os.getpid()

    def measure(self, choices: Choices, batches: Sequence[Container]) -> Measured:
        """`batches` are the same in every call; a process that was restarted runs the parent on them again."""
        import torch

        from puzzle_ray.distill.library import Library
        from puzzle_ray.evaluation.child_meter import ChildMeter

        if self.meter is None:
            self.meter = ChildMeter(self.stack, Library(self.library), [torch.from_numpy(batch.copy()) for batch in batches])
        measured: Measured = self.meter.measure(choices)
        return measured


@ray.remote(max_restarts=3, max_task_retries=3)  # measuring again gives the same
class MeterActor(Meter):
    """A meter as an actor."""


def file_name(choices: Choices) -> str:
    """Of a child's measurement in the step."""
    labels = ", ".join(choice.label for choice in choices)
    return f"children/{hashlib.sha256(labels.encode()).hexdigest()[:20]}.json"


class MeterPool:
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
        self.workers: list[ActorHandle[Any]] = []

    def __call__(self, children: Sequence[Choices]) -> list[Measured]:
        """In the order asked for. Raises ClusterError when workers cannot be placed or stop answering."""
        todo = [c for c in dict.fromkeys(children) if not self.artifact.exists(file_name(c))]
        if todo:
            self._start(len(todo))
            self._measure(todo)
        return [Measured(**self.artifact.read_json(file_name(c))["measured"]) for c in children]

    def _start(self, most: int) -> None:
        """As many workers as there is room for, up to `most`. Each holds the whole parent: the GPU shares of all its shards, or a CPU."""
        gpus = self.cluster.num_shards * self.cluster.gpus_per_shard
        if gpus > 1:
            gpus = 0
            if not self.workers:
                words = "  measure: a whole parent takes more than one GPU; children are measured on CPUs"
                print(words, file=sys.stderr, flush=True)
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus}
        room = require(options, "a children's meter", "search", self.cluster.autoscaling) or 1
        self.workers += [
            MeterActor.options(**options, runtime_env=environment(1)).remote(self.parent, self.library, 1, gpus)  # type: ignore[attr-defined]
            for _ in range(min(room, most) - len(self.workers))
        ]
        wait_ready(self.workers, "children's meters", self.cluster.placement_timeout_s)

    def _measure(self, todo: Sequence[Choices]) -> None:
        batches = ray.put(self.batches)
        waiting, timeout_s = list(reversed(todo)), self.cluster.step_timeout_s
        running: dict[ObjectRef[Measured], tuple[Choices, ActorHandle[Any]]] = {}

        def start(worker: ActorHandle[Any]) -> None:
            if waiting:
                choices = waiting.pop()
                running[worker.measure.remote(choices, batches)] = (choices, worker)

        with self.progress.stage("measure", len(todo), "child") as bar:
            for worker in self.workers:
                start(worker)
            while running:
                done, _ = ray.wait(list(running), num_returns=1, timeout=timeout_s)
                if not done:
                    problem = f"no child was measured within {timeout_s:g} s"
                    raise ClusterError("search", problem, "raise cluster.step_timeout_s")
                choices, worker = running.pop(done[0])
                measured = ray.get(done[0], timeout=timeout_s)
                self.artifact.write_json(
                    file_name(choices), {"choices": [c.label for c in choices], "measured": asdict(measured)}
                )
                bar.advance()
                start(worker)

    def close(self) -> None:
        end(self.workers)
        self.workers = []


@contextmanager
def measuring(
    parent: str, library: Artifact, batches: Sequence[Container], cluster: ClusterConfig, artifact: Artifact, progress: Progress
) -> Iterator[MeterPool]:
    """A pool for as long as it is needed."""
    pool = MeterPool(parent, library, batches, cluster, artifact, progress)
    try:
        yield pool
    finally:
        pool.close()
