"""A cluster described in words, and which processes of a plan its GPUs cannot hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from puzzle_ray.errors import ConfigError
from puzzle_ray.planning.demand import Demand, Work
from puzzle_ray.profiling.devices import Device, device_of

MIB = 1 << 20
CONTEXT_BYTES = 1 << 30  # of a GPU's memory that the CUDA context of a process and the allocator's gaps take; a rule of thumb
_WORDS = re.compile(r"\s*(\d+)\s*x\s*(\d+)\s+(\S.*?)\s*")


@dataclass(frozen=True)
class Hardware:
    """`nodes` nodes with `gpus` GPUs each."""

    nodes: int
    gpus: int
    device: Device

    @classmethod
    def parse(cls, words: str) -> Hardware:
        """`8x8 H100-80GB`: nodes, GPUs of each, the device by name. Raises ConfigError."""
        match, remedy = _WORDS.fullmatch(words), 'write nodes x GPUs and a device, such as "8x8 H100-80GB"'
        if match is None or not int(match[1]) or not int(match[2]):
            raise ConfigError("--cluster", f"{words!r} describes no cluster", remedy)
        try:
            device = device_of(match[3])
        except ValueError as error:
            raise ConfigError("--cluster", str(error), remedy) from None
        if device is None:
            raise ConfigError("--cluster", f"{match[3]!r} is no GPU", remedy)
        return cls(int(match[1]), int(match[2]), device)

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus

    def room_bytes(self, share: float) -> int:
        """What a process has that is given a share of a GPU."""
        return int(self.device.memory_mib * MIB * share) - CONTEXT_BYTES

    def hours(self, work: Work, mfu: float) -> float:
        """With all GPUs busy at a share `mfu` of their peak rate in the dtype that most of the work is computed in."""
        return work.flops / (self.num_gpus * self.device.tflops[work.dtype] * 1e12 * mfu) / 3600


def problems(demands: Sequence[Demand], hardware: Hardware) -> list[str]:
    """What does not fit, each with the setting that would mend it."""
    found = []
    for demand in demands:
        if demand.gpu_share and demand.total > hardware.room_bytes(demand.gpu_share):
            room = hardware.room_bytes(demand.gpu_share)
            what = f"{demand.stage}: a {demand.process} needs {demand.total / 2**30:.1f} GiB"
            found.append(f"{what}, its share of a {hardware.device.name} has {room / 2**30:.1f} GiB; {demand.remedy}")
        if demand.gpu_share * demand.count > hardware.num_gpus:
            what = f"{demand.stage}: {demand.count} x {demand.process} take {demand.gpu_share * demand.count:g} GPUs"
            found.append(f"{what}, the cluster has {hardware.num_gpus}; ask for fewer or for smaller shares")
    return found
