"""The nodes of a Ray cluster as `hardware: auto` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.placement import ROUNDING, all_nodes
from actors.placement import Node as RayNode
from puzzle_ray.errors import ClusterError
from puzzle_ray.profiling.devices import device_of
from puzzle_ray.profiling.nodes import Gpus, Node, gpus_of, probe_gpus

LABEL, PREFIX = "ray.io/accelerator-type", "accelerator_type:"


def accelerator_type(node: RayNode) -> str:
    """What Ray calls a node's GPUs, such as `H100`; empty where it does not know them."""
    label = node.get("Labels", {}).get(LABEL)
    named = [name.removeprefix(PREFIX) for name in node["Resources"] if name.startswith(PREFIX)]
    return str(label or (sorted(named)[0] if named else ""))


def find_nodes(timeout_s: float) -> list[Node]:
    """Every live node with what it has. One node of each kind that has GPUs is asked what they are.

    Raises ClusterError where that node does not answer in time, or nobody knows its GPUs.
    """
    alive = all_nodes()
    kinds: dict[tuple[str, float], Gpus] = {}
    for node in alive:
        kind = (accelerator_type(node), float(node["Resources"].get("GPU", 0.0)))
        if kind[1] >= 1 - ROUNDING and kind not in kinds:
            kinds[kind] = _gpus(node, kind[0], int(kind[1] + ROUNDING), timeout_s)
    return [_node(node, kinds.get((accelerator_type(node), float(node["Resources"].get("GPU", 0.0))))) for node in alive]


def _node(node: RayNode, gpus: Gpus | None) -> Node:
    resources: Mapping[str, Any] = node["Resources"]
    return Node(int(resources.get("CPU", 0) + ROUNDING), int(resources.get("memory", 0)), gpus)


def _gpus(node: RayNode, named: str, count: int, timeout_s: float) -> Gpus:
    """By the node itself; where torch sees none there, by the name that Ray has for them."""
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(probe_gpus).options(scheduling_strategy=there).remote(True)
    remedy = 'write what the cluster has, such as hardware: "8x8 H100-80GB", or set the settings yourself'
    where = f"node {node['NodeManagerAddress']}"
    try:
        found: Gpus | None = ray.get(task, timeout=timeout_s)
    except GetTimeoutError:
        ray.cancel(task, force=True)
        raise ClusterError("hardware", f"{where} did not say within {timeout_s:g} s what its GPUs are", remedy) from None
    except RayError as error:
        reason = (str(error).strip().splitlines() or [""])[-1]
        raise ClusterError("hardware", f"{where} cannot say what its GPUs are ({reason})", remedy) from None
    if found is not None:
        return Gpus(count, named or found.name, found.memory_bytes, found.bfloat16)
    try:
        device = device_of(named) if named else None
    except ValueError:
        device = None
    if device is None:
        raise ClusterError("hardware", f"nobody knows the {count} GPUs of {where} (Ray calls them {named!r})", remedy)
    return gpus_of(device, count)


def gpus_in_all() -> float:
    """GPUs of the live nodes."""
    return float(sum(node["Resources"].get("GPU", 0.0) for node in all_nodes()))
