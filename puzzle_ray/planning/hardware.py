"""A cluster described in words, and which processes of a plan its GPUs, or its hosts, cannot hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from puzzle_ray.errors import ConfigError
from puzzle_ray.planning.needs import Demand, Work
from puzzle_ray.profiling.devices import Device
from puzzle_ray.profiling.nodes import GIB, REMEDY, Node, described, gpus_of

CONTEXT_BYTES = 1 << 30  # of a GPU's memory that the CUDA context of a process and the allocator's gaps take; a rule of thumb


class Cluster(Protocol):
    """Equal GPUs: what they are called, what each has in bytes, and how many there are."""

    @property
    def name(self) -> str: ...

    @property
    def gpu_bytes(self) -> int: ...

    @property
    def num_gpus(self) -> int: ...


def room_bytes(cluster: Cluster, share: float) -> int:
    """What a process has that is given a share of a GPU, or several."""
    return int(cluster.gpu_bytes * share) - CONTEXT_BYTES * max(1, math.ceil(share))


@dataclass(frozen=True)
class Seen:
    """The GPUs of the nodes that a run found; of different ones, the smallest memory counts for all."""

    name: str
    gpu_bytes: int
    num_gpus: int
    per_node: int = 1  # of the node that has most

    @classmethod
    def of(cls, nodes: Sequence[Node]) -> Seen | None:
        """None where no node has a GPU."""
        found = [node.gpus for node in nodes if node.gpus is not None]
        if not found:
            return None
        least = min(found, key=lambda gpus: gpus.memory_bytes)
        return cls(least.name, least.memory_bytes, sum(gpus.count for gpus in found), max(gpus.count for gpus in found))


@dataclass(frozen=True)
class Hardware:
    """`nodes` nodes with `gpus` GPUs each."""

    nodes: int
    gpus: int
    device: Device

    @classmethod
    def parse(cls, words: str) -> Hardware:
        """`8x8 H100-80GB`: nodes, GPUs of each, the device by name. Raises ConfigError."""
        try:
            return cls(*described(words))
        except ValueError as error:
            raise ConfigError("--cluster", str(error), REMEDY) from None

    def as_nodes(self) -> list[Node]:
        """What `hardware: auto` would see of it."""
        return [Node(gpus=gpus_of(self.device, self.gpus))] * self.nodes

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus

    @property
    def name(self) -> str:
        return self.device.name

    @property
    def gpu_bytes(self) -> int:
        return gpus_of(self.device, 1).memory_bytes

    def busy_gpus(self, work: Work) -> float:
        """How many of them the stage uses."""
        return min(float(self.num_gpus), work.gpus or self.num_gpus)

    def hours(self, work: Work, mfu: float) -> float:
        """With all GPUs of a stage busy at a share `mfu` of their peak rate in the dtype that most of the work is computed in."""
        return work.flops / (self.busy_gpus(work) * self.device.tflops[work.dtype] * 1e12 * mfu) / 3600


def problems(demands: Sequence[Demand], cluster: Cluster) -> list[str]:
    """What the GPUs do not hold, each with the setting that would mend it. All kinds of processes of a stage run at the same time."""
    found = []
    for demand in demands:
        if demand.gpu_share and demand.total > room_bytes(cluster, demand.gpu_share):
            room = room_bytes(cluster, demand.gpu_share)
            what = f"{demand.stage}: a {demand.process} needs {demand.total / 2**30:.1f} GiB"
            found.append(f"{what}, its share of a {cluster.name} has {room / 2**30:.1f} GiB; {demand.remedy}")
    for stage, kinds in _by_stage(demands).items():
        asking = [d for d in kinds if d.gpu_share and not d.waits]
        in_one_process = any(d.in_turn and cluster.num_gpus <= d.gpu_share for d in asking)
        asked = sum(d.gpu_share * d.count for d in asking if not (in_one_process and d.in_turn))
        if asked > cluster.num_gpus * (1 + 1e-6):
            fewer = "; or ".join(dict.fromkeys(d.fewer for d in asking))
            words = " and ".join(d.words for d in asking)
            found.append(f"{stage}: {words} take {asked:g} GPUs, the cluster has {cluster.num_gpus}; {fewer}")
    return found


def host_bytes(demands: Sequence[Demand]) -> dict[str, int]:
    """What every stage's processes hold in the memory of all hosts together, in bytes; of those that wait for their turn, one."""
    return {stage: sum(d.host_bytes * d.at_once for d in kinds) for stage, kinds in _by_stage(demands).items()}


def host_problems(demands: Sequence[Demand], nodes: Sequence[Node]) -> list[str]:
    """What the nodes' own memory, which is known, does not hold: one process, or all of a stage's on all nodes."""
    memory = [node.memory_bytes for node in nodes]
    found, stages = [], _by_stage(demands)
    for demand in demands:
        if demand.host_bytes > max(memory):
            what = f"{demand.stage}: a {demand.process} needs {demand.host_bytes / GIB:.1f} GiB of a host's memory"
            found.append(f"{what}, the largest node has {max(memory) / GIB:.1f} GiB; {demand.remedy}")
    for stage, needed in host_bytes(demands).items():
        if needed > sum(memory) and not any(line.startswith(f"{stage}: ") for line in found):
            largest = max(stages[stage], key=lambda d: d.host_bytes * d.at_once)
            what = f"{stage}: {' and '.join(d.words for d in stages[stage])} need {needed / GIB:.1f} GiB of the hosts' memory together"
            found.append(f"{what}, the nodes have {sum(memory) / GIB:.1f} GiB; {largest.remedy}")
    return found


def _by_stage(demands: Sequence[Demand]) -> dict[str, list[Demand]]:
    return {stage: [d for d in demands if d.stage == stage] for stage in dict.fromkeys(d.stage for d in demands)}
