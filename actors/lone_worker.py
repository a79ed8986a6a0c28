"""Single pieces of heavy work on a worker: weights go from file to file, never through the driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.model_shards import OneAfterTheOther, Placement, Shards, Started
from actors.names import actor_name
from actors.placement import node_cpus, require
from actors.pool import Pool, Terms
from actors.transport import Container
from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.evaluation.comparison import Comparison
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Artifact


def realize(num_threads: int, parent: str, choices: Sequence[LayerChoice], library: Artifact, artifact: Artifact) -> None:
    """Assembles and publishes a child."""
    from puzzle_ray.distill import realize as whole
    from puzzle_ray.process import compute_with

    compute_with(num_threads)
    whole.realize(parent, choices, library, artifact)


def evaluate(
    num_threads: int, folders: Mapping[str, str], batches: Sequence[Container], how: Comparison, num_gpus: float
) -> dict[str, Any]:
    """Measures the parent and its children side by side."""
    import torch

    from puzzle_ray.evaluation import evaluate as library
    from puzzle_ray.process import compute_with

    compute_with(num_threads)
    return library.evaluate(folders, [torch.from_numpy(batch.copy()) for batch in batches], how, Quiet(), num_gpus)


def evaluate_in_shards(
    num_threads: int,
    shards: Shards | OneAfterTheOther,
    num_gpus: float,
    folders: Mapping[str, str],
    batches: Sequence[Container],
    how: Comparison,
) -> dict[str, Any]:
    """The same, with the models' layers in shards, and nothing timed."""
    import torch

    from puzzle_ray.evaluation import evaluate as library
    from puzzle_ray.process import compute_with, device_for

    compute_with(num_threads)
    tensors, where = [torch.from_numpy(batch.copy()) for batch in batches], (shards.layers_of, shards.num_shards)
    return library.evaluate_in_shards(folders, tensors, how, Quiet(), *where, device_for(num_gpus))


def predict_in_shards(
    num_threads: int,
    shards: Shards | OneAfterTheOther,
    num_gpus: float,
    folders: Mapping[str, str],
    batches: Sequence[Container],
    separator: int | None = None,
) -> dict[str, dict[str, float]]:
    """Held-out predictions of models whose layers lie in shards."""
    import torch

    from puzzle_ray.evaluation.evaluate import ShardedModels, predictions
    from puzzle_ray.process import compute_with, device_for

    compute_with(num_threads)
    models = ShardedModels(folders, shards.layers_of, device_for(num_gpus))
    return predictions(models, [torch.from_numpy(batch.copy()) for batch in batches], separator=separator)


def predict(
    num_threads: int, folders: Mapping[str, str], batches: Sequence[Container], num_gpus: float, separator: int | None = None
) -> dict[str, dict[str, float]]:
    """Held-out predictions of the parent and its children, nothing timed."""
    import torch

    from puzzle_ray.evaluation.evaluate import Models, predictions
    from puzzle_ray.process import compute_with, devices_for

    compute_with(num_threads)
    models = Models(folders, devices_for(num_gpus))
    return predictions(models, [torch.from_numpy(batch.copy()) for batch in batches], separator=separator)


@ray.remote(max_restarts=0)  # the pool starts another, which does the work again from the start, into the same step
class LoneWorker:
    """Has a node's cores to itself. `what` it is for."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __repr__(self) -> str:
        return f"LoneWorker({self.what})"

    def node(self) -> str:
        """The id of the node this runs on."""
        return ray.get_runtime_context().get_node_id()

    def call(self, function: Callable[..., Any], num_threads: int, args: Sequence[Any]) -> Any:
        return function(num_threads, *args)


def run_alone(
    function: Callable[..., Any],
    *args: Any,
    cluster: ClusterConfig,
    what: str,
    profile: ProfileConfig | None = None,
    timeout_s: float = 24 * 3600.0,
) -> Any:
    """Runs `function(num_threads, *args)` with all cores of one node, so that nothing else of ours disturbs it there.

    With `profile`, on the kind of node that profiles. Raises ClusterError when no node takes it within
    `cluster.placement_timeout_s`, when its process keeps dying, or when it does not end within `timeout_s`.
    """
    resources, labels = (dict(profile.resources), dict(profile.label_selector)) if profile else ({}, {})
    threads = node_cpus(resources, labels)
    options: dict[str, Any] = {"num_cpus": threads, "num_gpus": profile.num_gpus if profile else 0}
    options |= {name: value for name, value in (("resources", resources), ("label_selector", labels)) if value}

    def check() -> int:
        return require(options, f"the worker for {what}", what, cluster.autoscaling)

    def start_one() -> tuple[ActorHandle[Any], list[ActorHandle[Any]]]:
        worker = _worker(options, what)
        return worker, [worker]

    check()
    when_late, when_dead = "check the cluster with `ray status`", "if it lacked memory, use a bigger node"
    terms = Terms(what, f"workers for {what}, with {threads} CPUs,", cluster.placement_timeout_s, timeout_s, when_late, when_dead)
    pool: Pool[ActorHandle[Any], str] = Pool(start_one, terms, check=check)
    return _only_result(pool, what, lambda worker: worker.call.remote(function, threads, args))


def run_beside_shards(
    function: Callable[..., Any], *args: Any, placement: Placement, what: str, timeout_s: float = 24 * 3600.0
) -> Any:
    """Runs `function(1, shards, num_gpus, *args)` in a process beside running shards.

    A shard that dies is started again by Ray, and goes on; where the process itself dies, all of it is done again. Raises ClusterError
    when they have no room within `cluster.placement_timeout_s`, when they keep dying, or when one is silent for `cluster.step_timeout_s`.
    """
    cluster = placement.cluster

    def start_one() -> tuple[Started, list[ActorHandle[Any]]]:
        started = placement.start(lambda options: _worker(options, what))
        return started, started.actors

    workers = f"set of {len(placement.layers)} shards and who asks them, for {what},"
    terms = Terms(
        what, workers, cluster.placement_timeout_s, timeout_s, when_dead="raise evaluate.num_shards, or use bigger nodes"
    )
    pool: Pool[Started, str] = Pool(start_one, terms)
    return _only_result(
        pool, what, lambda started: started.worker.call.remote(function, 1, (started.shards, placement.num_gpus, *args))
    )


def _worker(options: Mapping[str, Any], what: str) -> ActorHandle[Any]:
    worker: ActorHandle[Any] = LoneWorker.options(**options, **actor_name(f"worker, {what}")).remote(what)  # type: ignore[attr-defined]
    return worker


def _only_result(pool: Pool[Any, str], what: str, send: Callable[[Any], Any]) -> Any:
    """What one worker made of the one item."""
    found: list[Any] = []

    def receive(_: str, result: Any) -> bool:
        found.append(result)
        return False

    with pool:
        pool.start(1)
        pool.run([what], lambda worker, _: send(worker), receive, name_of=str)
    return found[0]
