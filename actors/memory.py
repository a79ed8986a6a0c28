"""The memory that Ray is asked for, so that no node takes more workers than it can hold."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ray

from actors.nodes import find_nodes
from actors.placement import matching_nodes, nodes, places, resources_of
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.errors import ClusterError

GIB = 2**30
FLOAT32_BYTES = 4
ROOM = 1.25  # times a model's weights, that it needs of a GPU: it has activations, too
ALLOWANCE_BYTES = (
    512 << 20
)  # of a worker beside its weights: Python, torch and its libraries, and the activations of a small batch
IN_SHARDS = "set evaluate.num_shards, or hardware: auto: layers then lie in so many processes"
UNKNOWN = "nobody knows what GPUs the nodes have"
LARGEST_SHARE = 0.8  # of a node's memory that one worker asks for: Ray counts what was free at its start, which varies a little


def weight_bytes(folder: Path, bytes_per_value: int, layers: range | None = None) -> int:
    """What a checkpoint's tensors take once loaded, by the headers of its files; with `layers`, without the other layers."""
    from safetensors import safe_open

    from puzzle_ray.models.checkpoint import Checkpoint
    from puzzle_ray.models.child import read_config
    from puzzle_ray.models.describe import describe

    prefix = "" if layers is None else f"{describe(read_config(folder)).layers}."
    by_file: dict[Path, list[str]] = {}
    for name, path in Checkpoint(folder).files.items():
        if layers is None or not name.startswith(prefix) or int(name.removeprefix(prefix).split(".")[0]) in layers:
            by_file.setdefault(path, []).append(name)
    values = 0
    for path, names in by_file.items():
        with safe_open(path, framework="pt") as opened:
            for name in names:
                count = 1
                for length in opened.get_slice(name).get_shape():
                    count *= length
                values += count
    return values * bytes_per_value


def largest_node_bytes() -> int:
    """What the largest node has for one worker, beside the allowance; 0 where no node says."""
    most = max((node["Resources"].get("memory", 0.0) for node in nodes()), default=0.0)
    return max(0, int(most) - ALLOWANCE_BYTES) if most else 0


def gpus_of_a_node(timeout_s: float) -> tuple[int, int]:
    """The memory of the smallest GPU of the cluster, and how many a node has at the most; 0 where there is none, or nobody knows them."""
    try:
        found = [node.gpus for node in find_nodes(timeout_s) if node.gpus is not None]
    except ClusterError as error:
        print(f"  {error}", file=sys.stderr, flush=True)
        found = []
    return min((gpus.memory_bytes for gpus in found), default=0), max((gpus.count for gpus in found), default=0)


def check_who_evaluates(parent: str, cluster: ClusterConfig, num_gpus: float, where: str) -> None:
    """Raises ClusterError where a CPU would read a whole parent (`profile.num_gpus` is 0) whose shards compute on GPUs that are smaller."""
    from puzzle_ray.models.checkpoint import locate
    from puzzle_ray.models.child import read_config
    from puzzle_ray.models.shards import own_dtype

    if num_gpus or not cluster.gpus_per_shard:
        return
    folder, (each, _) = locate(parent), gpus_of_a_node(cluster.placement_timeout_s)
    size = ROOM * weight_bytes(folder, own_dtype(folder, read_config(folder)).itemsize)
    if each and size > each:
        why = f"which takes {size / GIB:.1f} GiB, and a GPU has {each / GIB:.1f}"
    elif not each and cluster.num_shards * cluster.gpus_per_shard > 1:
        why = f"and {UNKNOWN}"
    else:
        return
    problem = f"with profile.num_gpus=0 a CPU would read the whole parent, {why}"
    raise ClusterError(where, problem, f"{IN_SHARDS}; or set profile.num_gpus")


def with_memory(options: Mapping[str, Any], held_bytes: int, what: str, where: str, count: int = 1) -> dict[str, Any]:
    """Ray options that ask for `held_bytes` and the allowance, for each of `count` workers that must all have room.

    Where the nodes have not so much, this is said, and the options ask for no memory: what ran without it still runs.
    """
    needed = held_bytes + ALLOWANCE_BYTES
    sizes = [
        node["Resources"].get("memory", 0.0) for node in matching_nodes(resources_of(options), options.get("label_selector"))
    ]
    largest = max(sizes, default=0.0)
    asked = {**options, "memory": int(min(needed, LARGEST_SHARE * largest))}
    enough = needed <= largest and places(asked) >= count
    if enough and ray.available_resources().get("memory", 0.0) >= count * asked["memory"]:
        return asked
    if sizes:
        each = f"{count} x {what}" if count > 1 else what
        problem = f"{each} may need {needed / GIB:.2f} GiB each, and the largest node has {largest / GIB:.2f} GiB"
        print(f"  {where}: {problem}; Ray is not asked for memory", file=sys.stderr, flush=True)
    return dict(options)


def whole_model(folders: Iterable[str], cluster: ClusterConfig, what: str, where: str) -> tuple[dict[str, Any], float]:
    """Ray options of a worker that holds one whole model at a time, in float32, and its share of a GPU.

    It has the GPU shares of all the parent's shards together; where those, or the largest model, are more than one GPU, as many GPUs of a
    node as that model takes, over which it is spread; without GPUs one CPU and that model's memory. Raises ClusterError where no node has
    so many, or nobody knows how large several are.
    """
    from puzzle_ray.models.checkpoint import locate

    gpus = cluster.num_shards * cluster.gpus_per_shard
    largest = max(weight_bytes(locate(folder), FLOAT32_BYTES) for folder in folders)
    if gpus:
        each, most = gpus_of_a_node(cluster.placement_timeout_s)
        if gpus > 1 and not each:
            raise ClusterError(where, f"a whole model may take several GPUs, and {UNKNOWN}", IN_SHARDS)
        if gpus > 1 or largest > each > 0:
            gpus = float(math.ceil(ROOM * largest / each))
        if gpus > 1 and gpus > most:
            raise ClusterError(where, f"a whole model takes {gpus:g} GPUs, and no node has more than {most}", IN_SHARDS)
    options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus}
    if not gpus:
        options = with_memory(options, largest, what, where)
    return options, gpus
