"""The profile stage on Ray: a pool of profilers, each alone on what it measures."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from actors.parent_shard import environment
from actors.placement import end, wait_ready
from actors.remote_work import largest_node_cpus
from puzzle_ray.artifacts import Profile, SearchSpace
from puzzle_ray.checkpoint import locate, read_config
from puzzle_ray.config import ClusterConfig, ProfileConfig
from puzzle_ray.errors import ClusterError, ProfileError
from puzzle_ray.profiling.measure import Item, Result, measure, merge, plan, runs_of, save_item, unfinished
from puzzle_ray.progress import Bar, Progress
from puzzle_ray.store import Step


class ShapeProfiler:
    """Measures items, one at a time, with random weights in the parent's shapes. Keeps nothing between them."""

    def __init__(self, parent: str, config: ProfileConfig, num_threads: int) -> None:
        self.model_config = read_config(locate(parent))
        self.config, self.num_threads = config, num_threads
        self.runs = 0

    def pid(self) -> int:
        return os.getpid()

    def work(self, item: Item) -> Result:
        """All shapes of one layer type at one batch size."""
        import torch

        torch.set_num_threads(self.num_threads)  # holds for the calling thread, so it belongs here
        self.runs = 0
        return measure(item, self.model_config, self.config, self)

    def advance(self, count: int = 1, **facts: float) -> None:
        self.runs += count

    def runs_done(self) -> int:
        """How far `work` is, in runs of a model."""
        return self.runs


@ray.remote(max_restarts=2, max_task_retries=2, concurrency_groups={"status": 1})  # measuring again is safe
class Profiler(ShapeProfiler):
    """A profiler as an actor; `runs_done` answers while it works."""


@dataclass
class _Running:
    """An item on a profiler: what it answered last, since when, and how many runs the bar has seen."""

    profiler: ActorHandle[Any]
    item: Item
    since: float
    count: int = 0
    shown: int = 0


def profile_blocks(
    parent: str, space: SearchSpace, config: ProfileConfig, cluster: ClusterConfig, step: Step, progress: Progress
) -> Profile:
    """Measures every item that is not in the step yet.

    Raises ClusterError when profilers cannot be placed or stop answering, ProfileError when they cannot measure.
    """
    items = plan(space, config)
    todo = unfinished(items, step)
    if todo:
        profilers = _start(parent, min(config.num_profilers, len(todo)), config)
        try:
            wait_ready(profilers, "profilers", cluster.placement_timeout_s)
            with progress.stage("profile", sum(runs_of(item, config) for item in items), "run") as bar:
                bar.advance(sum(runs_of(item, config) for item in items if item not in todo))
                _measure_all(profilers, todo, config, step, cluster.step_timeout_s, bar)
        finally:
            end(profilers)
    return merge(items, config, step)


def _start(parent: str, count: int, config: ProfileConfig) -> list[ActorHandle[Any]]:
    """On CPUs a profiler takes a whole node, on GPUs its share of one.

    Its work runs beside `runs_done` in a thread of its own; with one arena malloc treats it as it treats a process' first thread.
    """
    threads = 1 if config.num_gpus else largest_node_cpus()
    variables = {**environment(threads)["env_vars"], "MALLOC_ARENA_MAX": "1"}
    options: dict[str, Any] = {"num_cpus": threads, "num_gpus": config.num_gpus, "runtime_env": {"env_vars": variables}}
    if config.resources:
        options["resources"] = dict(config.resources)
    if config.label_selector:
        options["label_selector"] = dict(config.label_selector)
    return [Profiler.options(**options).remote(parent, config, threads) for _ in range(count)]  # type: ignore[attr-defined]


def _measure_all(
    profilers: Sequence[ActorHandle[Any]], todo: Sequence[Item], config: ProfileConfig, step: Step, timeout_s: float, bar: Bar
) -> None:
    waiting = list(reversed(todo))
    running: dict[ObjectRef[Result], _Running] = {}

    def start(profiler: ActorHandle[Any]) -> None:
        if waiting:
            item = waiting.pop()
            running[profiler.work.remote(item)] = _Running(profiler, item, time.monotonic())

    for profiler in profilers:
        start(profiler)
    while running:
        done, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
        for ref in done:
            work = running.pop(ref)
            save_item(step, _result(ref, work.item, timeout_s))
            bar.advance(runs_of(work.item, config) - work.shown)
            start(work.profiler)
        for work in running.values():
            _show(work, bar)
            if time.monotonic() - work.since > timeout_s:
                problem = f"no run of {work.item.name} ended within {timeout_s:g} s"
                raise ClusterError("profile", problem, "raise cluster.step_timeout_s")


def _result(ref: ObjectRef[Result], item: Item, timeout_s: float) -> Result:
    try:
        return ray.get(ref, timeout=timeout_s)
    except RayActorError as error:
        problem = f"the process that measured {item.name} died again and again ({str(error).splitlines()[0]})"
        raise ProfileError("profile", problem, "if it lacked memory, lower profile.stack or the batch size") from None


def _show(work: _Running, bar: Bar) -> None:
    """Adds to the bar what is new. A profiler that is started again does not answer for a while, then counts from 0."""
    runs = work.profiler.runs_done.options(concurrency_group="status").remote()
    answered, _ = ray.wait([runs], timeout=1.0)
    try:
        count = ray.get(runs, timeout=1.0) if answered else 0
    except RayActorError:  # the work itself tells what became of it
        return
    if count != work.count:
        work.count, work.since = count, time.monotonic()
    if count > work.shown:
        bar.advance(count - work.shown)
        work.shown = count
