"""What can be known of the cluster, and for it, to be wrong before work starts."""

from __future__ import annotations

import sys
from pathlib import Path

from puzzle_ray.config import TINY, RunConfig
from puzzle_ray.errors import ClusterError
from puzzle_ray.store import Store


def check(config: RunConfig, store: Store) -> None:
    """What needs no cluster. Raises a PuzzleError with one clear line."""
    from actors.transport import find_transport
    from puzzle_ray import checks

    find_transport(config.cluster.transport)
    checks.check(config, store)


def check_cluster(config: RunConfig) -> None:
    """What can only be seen on the cluster, once joined. Raises ClusterError; GPUs that nobody asks for are a warning."""
    import ray

    from actors.nodes import gpus_in_all
    from actors.placement import all_nodes
    from jobs.session import joins
    from puzzle_ray.planning.resolve import idle

    have = int(ray.cluster_resources().get("CPU", 0))
    needs = dict([_least_workers(config), ("cluster.cpus_per_trainer", config.cluster.cpus_per_trainer)])
    for where, wanted in needs.items():
        if wanted > have and not config.cluster.autoscaling:
            raise ClusterError(where, f"{wanted} CPUs are needed and the cluster has {have}", f"lower {where}, or add nodes")
    for line in idle(config, gpus_in_all()):
        print(f"  WARNING: {line}", file=sys.stderr, flush=True)
    if joins(config.cluster) or len(all_nodes()) > 1:
        _check_nodes(config)


def check_gpus_of_gkd(config: RunConfig) -> None:
    """For a run that comes to GKD, the last stage that asks for GPUs. Raises ClusterError."""
    import ray

    if not config.gkd.use_gpu or not config.gkd.trains or config.cluster.autoscaling:
        return
    have = int(ray.cluster_resources().get("GPU", 0))
    where, wanted = _least_workers(config)
    if wanted > have:
        problem = f"{wanted} GPUs are needed, one a worker, and the cluster has {have}"
        raise ClusterError(where, problem, f"lower {where}, add nodes, or set gkd.use_gpu: false")


def _least_workers(config: RunConfig) -> tuple[str, int]:
    """The setting that says with how many workers GKD starts at the least, and how many that is."""
    gkd = config.gkd
    return ("gkd.num_workers", gkd.num_workers) if gkd.min_workers is None else ("gkd.min_workers", gkd.min_workers)


def _check_nodes(config: RunConfig) -> None:
    """A cluster of our own is this process's machine, and shares all with it."""
    from actors.preflight import check_nodes

    cluster, folder = config.cluster, Path(config.parent).expanduser()
    parent = str(folder.absolute()) if config.parent != TINY and folder.is_dir() else None
    gpus = (config.gkd.use_gpu, cluster.gpus_per_trainer, cluster.gpus_per_shard, config.profile.num_gpus)
    check_nodes(Store(config.store), parent, any(gpus), cluster.placement_timeout_s)
