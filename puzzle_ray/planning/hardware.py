"""A cluster described in words, and which processes of a plan its GPUs cannot hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from puzzle_ray.errors import ConfigError
from puzzle_ray.planning.needs import Demand, Work
from puzzle_ray.profiling.devices import Device
from puzzle_ray.profiling.nodes import REMEDY, Node, described, gpus_of

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
    """What does not fit, each with the setting that would mend it."""
    found = []
    for demand in demands:
        if demand.gpu_share and demand.total > room_bytes(cluster, demand.gpu_share):
            room = room_bytes(cluster, demand.gpu_share)
            what = f"{demand.stage}: a {demand.process} needs {demand.total / 2**30:.1f} GiB"
            found.append(f"{what}, its share of a {cluster.name} has {room / 2**30:.1f} GiB; {demand.remedy}")
        one_by_one = demand.waits or (demand.in_turn and cluster.num_gpus <= demand.gpu_share)
        if not one_by_one and demand.gpu_share * demand.count > cluster.num_gpus * (1 + 1e-6):
            what = f"{demand.stage}: {demand.count} x {demand.process} take {demand.gpu_share * demand.count:g} GPUs"
            found.append(f"{what}, the cluster has {cluster.num_gpus}; {demand.fewer}")
    return found
