"""The profile stage on Ray: a pool of profilers, each alone on what it measures."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from threading import Event
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from actors.names import actor_name
from actors.placement import DIED, not_placed, not_started, profiler_options, require, resources_of
from actors.pool import Pool, Terms
from puzzle_ray.artifacts import Profile, SearchSpace
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.errors import PuzzleError
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import read_config
from puzzle_ray.profiling.engine import Target, target_here
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


@ray.remote
def _target(config: ProfileConfig, num_threads: int) -> Target:
    return target_here(config, num_threads)


def ask_target(config: ProfileConfig, cluster: ClusterConfig) -> Target:
    """What a profiler would measure, as the node says that would hold one.

    Raises ClusterError where no node takes the question within `cluster.placement_timeout_s`, ProfileError where the device is missing.
    """
    while True:
        options = profiler_options(config)
        require(options, "a profiler", "profile", cluster.autoscaling)
        answer = _target.options(**options).remote(config, options["num_cpus"])
        try:
            target: Target = ray.get(answer, timeout=cluster.placement_timeout_s)
        except GetTimeoutError:
            ray.cancel(answer)
            raise not_placed("the question what a profiler would measure", cluster.placement_timeout_s) from None
        except RayTaskError as error:
            if isinstance(error.cause, PuzzleError):
                raise error.cause from None
            raise
        except RayError as error:
            raise not_started("the question what a profiler would measure", error) from None
        if profiler_options(config) == options:  # else a node has come meanwhile, or gone
            return target


class ShapeProfiler:
    """Measures items, one at a time, with random weights in the parent's shapes. Keeps nothing between them."""

    def __init__(self, parent: str, config: ProfileConfig, num_threads: int) -> None:
        self.config, self.num_threads = (
            config,
            num_threads,
        )  # first: Ray asks for the words of an actor whose constructor raised, too
        self.model_config = read_config(locate(parent))
        self.runs = 0

    def __repr__(self) -> str:
        return f"Profiler({self.config.engine}, {self.config.dtype})"

    def pid(self) -> int:
        return os.getpid()

    def node(self) -> str:
        """The id of the node this runs on."""
        return ray.get_runtime_context().get_node_id()

    def work(self, item: ProfileTask) -> Measurement:
        """All shapes of one layer type at one batch size."""
        import torch

        torch.set_num_threads(self.num_threads)  # holds for the calling thread: `work` has one of its own, beside `runs_done`
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


def profile_blocks(
    parent: str,
    space: SearchSpace,
    config: ProfileConfig,
    cluster: ClusterConfig,
    artifact: Artifact,
    progress: Progress,
    placed: Event | None = None,
    target: Target | None = None,
) -> Profile:
    """Measures every item that is not in the step yet. A profiler that measures anything but `target`, where one is given, is an error.

    `placed` is set as soon as no profiler waits for its place any more: what they hold of the nodes is claimed by then, and a stage
    that starts beside this one plans with the rest. It is set in any case when this returns or raises.
    Raises ClusterError when profilers cannot be placed or stop answering, ProfileError when they cannot measure.
    """
    items = profile_tasks(space, config)
    todo = unfinished_tasks(items, artifact)
    try:
        if todo:
            with progress.stage("profile", sum(num_runs(item, config) for item in items), "run") as bar:
                bar.advance(sum(num_runs(item, config) for item in items if item not in todo))
                _measure_all(parent, todo, config, cluster, artifact, bar, placed, target)
    finally:
        if placed:
            placed.set()
    return merge_profile(items, config, artifact)


def _measure_all(
    parent: str,
    todo: Sequence[ProfileTask],
    config: ProfileConfig,
    cluster: ClusterConfig,
    artifact: Artifact,
    bar: Bar,
    placed: Event | None,
    target: Target | None,
) -> None:
    """Each item is saved when it is measured. Where a profiler dies its item goes to whoever is free, itself to a node with room."""
    options = profiler_options(config)
    room = require(options, "a profiler", "profile", cluster.autoscaling)
    count = min(config.num_profilers, len(todo))
    if room < count and not cluster.autoscaling:
        print(f"  profile: {room} of {count} profilers have room in the cluster", file=sys.stderr, flush=True)
        count = max(1, room)
    terms = Terms(
        "profile",
        "profilers",
        cluster.placement_timeout_s,
        cluster.step_timeout_s,
        when_dead="if it lacked memory, lower profile.stack or the batch size",
    )
    followed = _Followed(config, bar)

    def start_one() -> tuple[ActorHandle[Any], list[ActorHandle[Any]]]:
        named = Profiler.options(**options, **actor_name(f"profiler, {config.engine}"))  # type: ignore[attr-defined]
        profiler = named.remote(parent, config, options["num_cpus"])
        return profiler, [profiler]

    def receive(item: ProfileTask, result: Measurement) -> bool:
        save_measurement(artifact, result, target)
        followed.done(item)
        return False

    def each_round() -> None:
        if placed and not pool.starting:
            placed.set()

    pool: Pool[ActorHandle[Any], ProfileTask] = Pool(
        start_one,
        terms,
        check=lambda: require(options, "a profiler", "profile", cluster.autoscaling),
        claims=resources_of(options),
    )
    with pool:
        pool.start(count)
        pool.run(
            todo,
            lambda profiler, item: profiler.work.remote(item),
            receive,
            name_of=lambda item: item.name,
            news=followed.look,
            each_round=each_round,
        )


class _Followed:
    """Moves the bar on while items are measured."""

    def __init__(self, config: ProfileConfig, bar: Bar) -> None:
        self.config, self.bar = config, bar
        self.last: Counter[str] = Counter()  # what the profiler that is at an item answered last, in runs of a model
        self.shown: Counter[str] = Counter()  # of the item's runs, on the bar

    def look(self, profiler: ActorHandle[Any], item: ProfileTask) -> bool:
        """Adds to the bar what is new; says whether anything is. A profiler that takes over an item counts from 0."""
        runs = profiler.runs_done.options(concurrency_group="status").remote()
        if not ray.wait([runs], timeout=1.0)[0]:
            return False
        try:
            count = ray.get(runs, timeout=1.0)
        except DIED:  # the work itself tells what became of it
            return False
        self._show(item, count)
        news: bool = count != self.last[item.name]
        self.last[item.name] = count
        return news

    def done(self, item: ProfileTask) -> None:
        self._show(item, num_runs(item, self.config))

    def _show(self, item: ProfileTask, count: int) -> None:
        if count > self.shown[item.name]:
            self.bar.advance(count - self.shown[item.name])
            self.shown[item.name] = count
