"""Who runs where: layers over shards and trainers, waiting for actors with a limit, and ending them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError

from puzzle_ray.config import ClusterConfig
from puzzle_ray.errors import ClusterError


def cluster_cpus() -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def runs(num_items: int, num_groups: int) -> list[range]:
    """`num_items` in `num_groups` contiguous runs whose lengths differ by at most one."""
    num_groups = max(1, min(num_groups, num_items))
    edges = [num_items * i // num_groups for i in range(num_groups + 1)]
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def trainer_groups(layers: Sequence[int], cluster: ClusterConfig) -> list[list[int]]:
    """Layers of each trainer process: one each where the cluster has the room, else as few processes as it has places."""
    if cluster.blocks_per_trainer == "auto":
        if cluster.gpus_per_trainer:
            places = int(ray.cluster_resources().get("GPU", 0) / cluster.gpus_per_trainer)
        else:
            places = cluster_cpus() // cluster.cpus_per_trainer
        groups = max(1, min(places, len(layers)))
    else:
        groups = -(-len(layers) // cluster.blocks_per_trainer)
    return [[layers[i] for i in run] for run in runs(len(layers), groups)]


def wait_ready(actors: Sequence[ActorHandle[Any]], what: str, timeout_s: float) -> None:
    """Until every actor has answered. Raises ClusterError naming what the cluster has when they cannot all be placed in time."""
    try:
        ray.get([actor.pid.remote() for actor in actors], timeout=timeout_s)
    except GetTimeoutError:
        have = {k: v for k, v in sorted(ray.cluster_resources().items()) if not k.startswith(("node:", "object_store"))}
        raise ClusterError(
            "cluster",
            f"{len(actors)} {what} did not start within {timeout_s:g} s; the cluster has {have}",
            "ask for less, add nodes, or raise cluster.placement_timeout_s",
        ) from None
    except RayActorError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ClusterError(
            "cluster", f"{what} could not start ({reason})", "see the worker's log in Ray's session folder"
        ) from None


def end(actors: Sequence[ActorHandle[Any]], timeout_s: float = 3.0) -> None:
    """Kills actors for good and waits a little for their resources to be free again."""
    if not actors:
        return
    total = ray.cluster_resources()
    for actor in actors:
        ray.kill(actor, no_restart=True)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and ray.available_resources().get("CPU", 0) < total.get("CPU", 0):
        time.sleep(0.05)
