"""The library stage on Ray: shards stream hidden states through the object store, trainers learn from them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from actors.block_trainer import BlockTrainer
from actors.parent_shard import ParentShard, environment
from actors.placement import end, runs, trainer_groups, wait_ready
from puzzle_ray.artifacts import SearchSpace
from puzzle_ray.config import ClusterConfig, LibraryConfig
from puzzle_ray.data import Tokens
from puzzle_ray.distill.bld import Schedule
from puzzle_ray.distill.library import Library, finish, unfinished_layers
from puzzle_ray.errors import ClusterError, OutOfOrder
from puzzle_ray.progress import Bar, Progress
from puzzle_ray.store import Step


class _Interrupted(Exception):
    """A trainer died or missed a micro-batch: drain, then go on from what all of them know."""


@dataclass
class _Stream:
    """The actors of one library stage and the micro-batches in flight between them."""

    shards: list[ActorHandle[Any]]
    shard_layers: list[range]
    trainers: list[ActorHandle[Any]]
    groups: list[list[int]]
    timeout_s: float

    def send(self, position: int, ids: Any) -> list[ObjectRef[Any]]:
        """Lets one micro-batch flow; returns one reference per trainer. Hidden state i is the input of layer i."""
        hidden: list[ObjectRef[Any]] = []
        entering: Any = ids
        for shard, layers in zip(self.shards, self.shard_layers, strict=True):
            returns = len(layers) + (not hidden)
            out = shard.forward.options(num_returns=returns).remote(entering)
            hidden += out if isinstance(out, list) else [out]
            entering = hidden[-1]
        pending = []
        for trainer, layers in zip(self.trainers, self.groups, strict=True):
            indices = sorted({i for layer in layers for i in (layer, layer + 1)})
            pending.append(trainer.step.remote(position, indices, *[hidden[i] for i in indices]))
        return pending

    def collect(self, pending: Sequence[ObjectRef[Any]]) -> float | None:
        """Waits for one micro-batch; returns the mean loss over trainers. Raises _Interrupted when a trainer has to catch up."""
        try:
            losses = [loss for loss in ray.get(list(pending), timeout=self.timeout_s) if loss is not None]
        except RayActorError as error:
            raise _Interrupted(str(error)) from error
        except GetTimeoutError:
            problem = f"a micro-batch was not done within {self.timeout_s:g} s"
            raise ClusterError("library", problem, "raise cluster.step_timeout_s, or lower library.micro_batch_tokens") from None
        except RayTaskError as error:
            if isinstance(error.cause, OutOfOrder) or isinstance(error, OutOfOrder):
                raise _Interrupted(str(error)) from error
            raise
        return sum(losses) / len(losses) if losses else None

    def drain(self, in_flight: Sequence[Sequence[ObjectRef[Any]]]) -> None:
        """Until nothing in flight runs any more, whatever became of it."""
        refs = [ref for pending in in_flight for ref in pending]
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=self.timeout_s)

    def last(self, deadline: float) -> int:
        """The last position every trainer has done; waits for those that are being started again."""
        while True:
            try:
                return min(ray.get([t.last.remote() for t in self.trainers], timeout=self.timeout_s))
            except RayActorError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


def _start(
    parent: str, layers: Sequence[int], space: SearchSpace, config: LibraryConfig, cluster: ClusterConfig, step: Step
) -> _Stream:
    shard_layers = runs(max(layers) + 1, cluster.num_shards)
    groups = trainer_groups(layers, cluster)
    shard_options = {"num_cpus": 0, "num_gpus": cluster.gpus_per_shard, "runtime_env": environment(1)}
    shards = [
        ParentShard.options(**shard_options).remote(parent, r.start, r.stop, "float32", config.activation_dtype, 1)  # type: ignore[attr-defined]
        for r in shard_layers
    ]
    threads = cluster.cpus_per_trainer
    trainer_options = {"num_cpus": threads, "num_gpus": cluster.gpus_per_trainer, "runtime_env": environment(threads)}
    trainers = [
        BlockTrainer.options(**trainer_options).remote(parent, group, space, config, step, threads)  # type: ignore[attr-defined]
        for group in groups
    ]
    try:
        wait_ready([*shards, *trainers], "parent shards and block trainers", cluster.placement_timeout_s)
    except BaseException:
        end([*shards, *trainers])
        raise
    return _Stream(shards, shard_layers, trainers, groups, cluster.step_timeout_s)


def _flow(stream: _Stream, start: int, schedule: Schedule, tokens: Tokens, seed: int, config: LibraryConfig, bar: Bar) -> None:
    """All positions from `start` on, at most `config.window` of them in flight."""
    sequences = config.micro_batch_tokens // tokens.sequences.shape[1]
    in_flight: deque[list[ObjectRef[Any]]] = deque()

    def settle() -> None:
        loss = stream.collect(in_flight[0])
        in_flight.popleft()
        bar.advance(1, **({} if loss is None else {"loss": loss}))

    try:
        for position in range(start, schedule.positions):
            while len(in_flight) >= config.window:
                settle()
            in_flight.append(stream.send(position, tokens.batch(seed, schedule.data_number(position), sequences).numpy()))
        while in_flight:
            settle()
    except _Interrupted:
        stream.drain(in_flight)
        raise


def build_library(
    parent: str,
    space: SearchSpace,
    config: LibraryConfig,
    cluster: ClusterConfig,
    tokens: Tokens,
    seed: int,
    step: Step,
    progress: Progress,
) -> Library:
    """Trains every variant that is not in the step yet. Survives the death of any shard or trainer.

    Raises ClusterError when the actors cannot be placed, or when more of them die than `cluster.max_recoveries`.
    """
    layers = unfinished_layers(space, step)
    schedule = Schedule.of(config)
    if layers:
        stream = _start(parent, layers, space, config, cluster, step)
        try:
            with progress.stage("library", schedule.positions, "micro-batch") as bar:
                _run(stream, schedule, tokens, seed, config, cluster, bar)
        finally:
            end([*stream.shards, *stream.trainers])
    return finish(space, step)


def _run(
    stream: _Stream, schedule: Schedule, tokens: Tokens, seed: int, config: LibraryConfig, cluster: ClusterConfig, bar: Bar
) -> None:
    shown = 0
    for recovery in range(cluster.max_recoveries + 1):
        start = stream.last(time.monotonic() + cluster.placement_timeout_s) + 1
        bar.advance(start - shown)
        counting = _Counting(bar, start)
        try:
            _flow(stream, start, schedule, tokens, seed, config, counting)
            return
        except _Interrupted as error:
            shown = counting.done
            reason = str(error).strip().splitlines()[0]
            if recovery == cluster.max_recoveries:
                raise ClusterError("library", f"trainers died {recovery + 1} times; the last time: {reason}") from error


class _Counting:
    """A bar that remembers how far it is, so that a step back is shown as one."""

    def __init__(self, bar: Bar, done: int) -> None:
        self.bar, self.done = bar, done

    def advance(self, count: int = 1, **facts: float) -> None:
        self.done += count
        self.bar.advance(count, **facts)
