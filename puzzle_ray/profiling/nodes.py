"""The nodes of a cluster as `hardware: auto` reads them: what they compute with, and how much of it. Without Ray."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from puzzle_ray.preflight import COUNT_TIMEOUT_S, VISIBLE
from puzzle_ray.process import num_cores
from puzzle_ray.profiling.devices import Device, device_of

GIB = 1 << 30
MIB = 1 << 20
REMEDY = 'write nodes x GPUs and a device, such as "8x8 H100-80GB"'
GPU_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd")  # one of them is there where a driver is
MOST_GPUS = 100_000  # of a cluster in words
_WORDS = re.compile(r"\s*(\d+)\s*[xX]\s*(\d+)(?:\s+|[xX])(\S.*?)\s*")
_PROBE = (
    "import json, torch; found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]; "
    "print(json.dumps([[p.name, p.total_memory, p.major] for p in found]))"
)
_FIRST_WITH_BFLOAT16 = 8  # NVIDIA's compute capability; AMD's numbers begin at 9 for what has it


@dataclass(frozen=True)
class Gpus:
    """The GPUs of one node, all alike."""

    count: int
    name: str
    memory_bytes: int  # of each
    bfloat16: bool = True  # whether they compute in it at full rate


@dataclass(frozen=True)
class Node:
    """One node. 0 is what nobody says."""

    cpus: int = 0
    memory_bytes: int = 0
    gpus: Gpus | None = None

    @property
    def words(self) -> str:
        if self.gpus is None:
            return f"{self.cpus} CPUs"
        return f"{self.gpus.count} x {self.gpus.name}, {self.gpus.memory_bytes / GIB:.0f} GiB each"


def in_words(nodes: Sequence[Node]) -> str:
    """`8 nodes of 8 x H100, 80 GiB each`; of several kinds each."""
    kinds = Counter(node.words for node in nodes)
    return "; ".join(f"{count} node{'s' if count > 1 else ''} of {words}" for words, count in kinds.items())


def described(words: str) -> tuple[int, int, Device]:
    """`8x8 H100-80GB`, or `8x8xH100-80GB`: nodes, GPUs of each, the device by name. Raises ValueError, which says what is wrong."""
    match = _WORDS.fullmatch(words)
    if match is None or not int(match[1]) or not int(match[2]):
        raise ValueError(f"{words!r} describes no cluster")
    if int(match[1]) * int(match[2]) > MOST_GPUS:
        raise ValueError(f"{words!r} describes more than {MOST_GPUS:,} GPUs")
    device = device_of(match[3])
    if device is None:
        raise ValueError(f"{match[3]!r} is no GPU")
    return int(match[1]), int(match[2]), device


def nodes_of(words: str) -> list[Node]:
    """The nodes of a cluster that is described by `described`."""
    count, gpus, device = described(words)
    return [Node(gpus=gpus_of(device, gpus))] * count


def gpus_of(device: Device, count: int) -> Gpus:
    """GPUs of a device whose figures are known."""
    return Gpus(count, device.name, int(device.memory_mib * MIB), "bfloat16" in device.tflops)


def probe_gpus(hidden_by_ray: bool) -> Gpus | None:
    """The GPUs of the machine that this runs on, as torch sees them; None where there are none.

    Torch is asked in a process of its own, which does not stay. Ray hides GPUs from the processes that it starts: from such a one
    `hidden_by_ray` is asked for. Of different GPUs in one machine, what is said is true of the weakest.
    """
    if not any(map(os.path.exists, GPU_FILES)):
        return None
    environment = {name: value for name, value in os.environ.items() if not (hidden_by_ray and name in VISIBLE)}
    command = [sys.executable, "-c", _PROBE]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COUNT_TIMEOUT_S, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    if not found:
        return None
    least = min(found, key=lambda gpu: int(gpu[1]))
    return Gpus(len(found), str(least[0]), int(least[1]), all(int(major) >= _FIRST_WITH_BFLOAT16 for *_, major in found))


def this_machine(gpus: bool = True) -> Node:
    """The machine that this process runs on; `gpus` is false for who computes on the CPU whatever there is."""
    import psutil

    return Node(num_cores(), int(psutil.virtual_memory().total), probe_gpus(False) if gpus else None)
