"""What a run tells Ray's metrics. Prometheus finds them at every node's metrics port, named `ray_puzzle_ray_...`.

Gauges of a driver carry the run's id; those of a worker the worker's name. `cluster/grafana.json` draws them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

PREFIX = "puzzle_ray_"
# Name -> (what it says, its tags)
GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "items_done": ("Units of a stage that are done.", ("run", "stage", "unit")),
    "items_left": ("Units of a stage that are left.", ("run", "stage", "unit")),
    "items_per_s": ("Units of a stage done per second, lately.", ("run", "stage", "unit")),
    "tokens_per_s": ("Training tokens per second, lately.", ("run", "stage")),
    "loss": ("The last loss that a stage reported.", ("run", "stage")),
    "queue_depth": ("Micro-batches in flight, or items that no worker has taken yet.", ("run", "stage")),
    "artifact_bytes": ("Bytes of a finished stage's artifact in the store.", ("run", "stage")),
    "gpu_memory_bytes": ("Bytes that torch holds on a worker's GPU.", ("worker",)),
}

_run_id = ""


def of_run(run_id: str) -> None:
    """The run whose id the gauges of this process carry from now on."""
    global _run_id
    _run_id = run_id


@cache
def _gauge(name: str) -> Any:
    from ray.util.metrics import Gauge

    description, tags = GAUGES[name]
    return Gauge(f"{PREFIX}{name}", description, tag_keys=tags)


def note(name: str, value: float, **tags: str) -> None:
    """Sets a gauge. Does nothing in a process without Ray."""
    import ray

    if ray.is_initialized():
        known = {"run": _run_id} if "run" in GAUGES[name][1] else {}
        _gauge(name).set(float(value), tags=known | tags)


def note_gpu_memory(worker: str, device: Any) -> None:
    """What torch holds on a worker's GPU; nothing on a CPU."""
    if device.type == "cuda":
        import torch

        note("gpu_memory_bytes", torch.cuda.memory_allocated(device), worker=worker)
