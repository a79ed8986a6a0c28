"""The profile stage on Ray: a pool of profilers, each alone on what it measures."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from actors.parent_shard import environment
from actors.placement import DIED, end, not_placed, not_started, require
from actors.remote_work import node_cpus
from puzzle_ray.artifacts import Profile, SearchSpace
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.errors import ClusterError, ProfileError
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import read_config
from puzzle_ray.profiling.measure import (
    Measurement,
    ProfileTask,
    measure_task,
    merge_profile,
    num_runs,
    profile_tasks,
    save_measurement,
    unfinished_tasks,
)
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.progress import Bar, Progress
from puzzle_ray.store import Artifact

MAX_DEATHS = 3  # of the process that measures one item, or that starts


class ShapeProfiler:
    """Measures items, one at a time, with random weights in the parent's shapes. Keeps nothing between them."""

    def __init__(self, parent: str, config: ProfileConfig, num_threads: int) -> None:
        self.model_config = read_config(locate(parent))
        self.config, self.num_threads = config, num_threads
        self.runs = 0

    def pid(self) -> int:
        return os.getpid()

    def work(self, item: ProfileTask) -> Measurement:
        """All shapes of one layer type at one batch size."""
        import torch

        torch.set_num_threads(self.num_threads)  # holds for the calling thread, so it belongs here
        self.runs = 0
        return measure_task(item, self.model_config, self.config, self)

    def advance(self, count: int = 1, **facts: float) -> None:
        self.runs += count

    def runs_done(self) -> int:
        """How far `work` is, in runs of a model."""
        return self.runs


@ray.remote(max_restarts=0, concurrency_groups={"status": 1})  # the pool starts another, and its item goes to whoever is free
class Profiler(ShapeProfiler):
    """A profiler as an actor; `runs_done` answers while it works."""


@dataclass
class _Work:
    """An item: who is at it, what that one answered last and since when, how many runs the bar has seen, how often it was lost."""

    item: ProfileTask
    profiler: ActorHandle[Any] | None = None
    since: float = 0.0
    count: int = 0
    shown: int = 0
    lost: int = 0


def profile_blocks(
    parent: str, space: SearchSpace, config: ProfileConfig, cluster: ClusterConfig, artifact: Artifact, progress: Progress
) -> Profile:
    """Measures every item that is not in the step yet.

    Raises ClusterError when profilers cannot be placed or stop answering, ProfileError when they cannot measure.
    """
    items = profile_tasks(space, config)
    todo = unfinished_tasks(items, artifact)
    if todo:
        pool = _Pool(parent, config, cluster, artifact)
        try:
            pool.start(min(config.num_profilers, len(todo)))
            with progress.stage("profile", sum(num_runs(item, config) for item in items), "run") as bar:
                bar.advance(sum(num_runs(item, config) for item in items if item not in todo))
                pool.measure(todo, bar)
        finally:
            pool.end()
    return merge_profile(items, config, artifact)


def options_of(config: ProfileConfig) -> dict[str, Any]:
    """A profiler's Ray options. On CPUs it takes a whole node of the kind asked for, on GPUs its share of one.

    Its work runs beside `runs_done` in a thread of its own; with one arena malloc treats it as it treats a process' first thread.
    """
    threads = 1 if config.num_gpus else node_cpus(config.resources, config.label_selector)
    variables = {**environment(threads)["env_vars"], "MALLOC_ARENA_MAX": "1"}
    options: dict[str, Any] = {"num_cpus": threads, "num_gpus": config.num_gpus, "runtime_env": {"env_vars": variables}}
    if config.resources:
        options["resources"] = dict(config.resources)
    if config.label_selector:
        options["label_selector"] = dict(config.label_selector)
    return options


class _Pool:
    """Profilers that work as soon as they are placed. Where one dies its item goes to whoever is free, itself to a node that has room."""

    def __init__(self, parent: str, config: ProfileConfig, cluster: ClusterConfig, artifact: Artifact) -> None:
        self.parent, self.config, self.cluster, self.artifact = parent, config, cluster, artifact
        self.options = options_of(config)
        self.starting: dict[ObjectRef[int], ActorHandle[Any]] = {}
        self.idle: list[ActorHandle[Any]] = []
        self.running: dict[ObjectRef[Measurement], _Work] = {}
        self.failed_starts = 0

    def start(self, count: int) -> None:
        """Asks for `count` profilers, or for as many as there are places. Raises ClusterError where there is none."""
        room = self._require()
        if room < count and not self.cluster.autoscaling:
            print(f"  profile: {room} of {count} profilers have room in the cluster", file=sys.stderr, flush=True)
            count = room
        for _ in range(count):
            self._add()

    def _require(self) -> int:
        return require(self.options, "a profiler", "profile", self.cluster.autoscaling)

    def _add(self) -> None:
        actor = Profiler.options(**self.options)  # type: ignore[attr-defined]
        profiler = actor.remote(self.parent, self.config, self.options["num_cpus"])
        self.starting[profiler.pid.remote()] = profiler

    def measure(self, todo: Sequence[ProfileTask], bar: Bar) -> None:
        """Until every item is in the step. Each is saved when it is measured; what is saved is not measured again."""
        waiting = [_Work(item) for item in reversed(todo)]
        alone_since = time.monotonic()
        while waiting or self.running:
            done, _ = ray.wait([*self.running, *self.starting], num_returns=1, timeout=1.0)
            for ref in done:
                if ref in self.starting:
                    self._started(ref)
                else:
                    self._ended(ref, waiting, bar)
            while self.idle and waiting:
                self._assign(self.idle.pop(), waiting.pop())
            if self.running:
                alone_since = time.monotonic()
                self._watch(bar)
            elif waiting:
                self._require()
                if time.monotonic() - alone_since > self.cluster.placement_timeout_s:
                    raise not_placed(f"{len(self.starting)} profilers", self.cluster.placement_timeout_s)

    def _started(self, ref: ObjectRef[int]) -> None:
        profiler = self.starting.pop(ref)
        try:
            ray.get(ref, timeout=self.cluster.step_timeout_s)
        except DIED as error:
            self.failed_starts += 1
            if self.failed_starts == MAX_DEATHS:
                raise not_started("profilers", error) from None
            self._add()
            return
        self.idle.append(profiler)

    def _assign(self, profiler: ActorHandle[Any], work: _Work) -> None:
        work.profiler, work.count, work.since = profiler, 0, time.monotonic()
        self.running[profiler.work.remote(work.item)] = work

    def _ended(self, ref: ObjectRef[Measurement], waiting: list[_Work], bar: Bar) -> None:
        work = self.running.pop(ref)
        assert work.profiler is not None
        try:
            result = ray.get(ref, timeout=self.cluster.step_timeout_s)
        except DIED as error:
            work.lost += 1
            if work.lost == MAX_DEATHS:
                problem = f"the process that measured {work.item.name} died again and again ({str(error).splitlines()[0]})"
                raise ProfileError("profile", problem, "if it lacked memory, lower profile.stack or the batch size") from None
            waiting.append(work)
            self._add()
            return
        save_measurement(self.artifact, result)
        bar.advance(num_runs(work.item, self.config) - work.shown)
        self.idle.append(work.profiler)

    def _watch(self, bar: Bar) -> None:
        for work in self.running.values():
            _show(work, bar)
            if time.monotonic() - work.since > self.cluster.step_timeout_s:
                problem = f"no run of {work.item.name} ended within {self.cluster.step_timeout_s:g} s"
                raise ClusterError("profile", problem, "raise cluster.step_timeout_s")

    def end(self) -> None:
        working = [work.profiler for work in self.running.values() if work.profiler is not None]
        end([*self.starting.values(), *self.idle, *working])


def _show(work: _Work, bar: Bar) -> None:
    """Adds to the bar what is new. A profiler that takes over counts from 0."""
    assert work.profiler is not None
    runs = work.profiler.runs_done.options(concurrency_group="status").remote()
    if not ray.wait([runs], timeout=1.0)[0]:
        return
    try:
        count = ray.get(runs, timeout=1.0)
    except DIED:  # the work itself tells what became of it
        return
    if count != work.count:
        work.count, work.since = count, time.monotonic()
    if count > work.shown:
        bar.advance(count - work.shown)
        work.shown = count
