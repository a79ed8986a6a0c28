"""Whether the workers of a global distillation hold everything each (DDP), or a shard each (FSDP)."""

from __future__ import annotations

import math

import torch

from puzzle_ray.distill.gkd import CHILD, GkdJob
from puzzle_ray.distill.gradients import AllReduce
from puzzle_ray.distill.settings import GkdConfig
from puzzle_ray.models.checkpoint import Checkpoint, locate

STATE_BYTES = 16  # a parameter of the child: float32 weights, gradients and two moments
BEST_BYTES = 4  # and its best weights, where training is watched
AVERAGE_BYTES = 4  # and their average, where there is one
SHARE = 0.5  # of a device's memory that these and the parent may take; the rest is for what a step computes


def ddp_bytes(child: Checkpoint, parent: Checkpoint, watched: bool, averaged: bool = False) -> int:
    """What a worker holds that holds everything, beside what a step computes. Reads the headers of the files."""

    def count(source: Checkpoint) -> int:
        return sum(math.prod(shape) for _, shape in source.headers.values())

    own = sum((4 if dtype == "F32" else 2) * math.prod(shape) for dtype, shape in parent.headers.values())
    return count(child) * (STATE_BYTES + BEST_BYTES * watched + AVERAGE_BYTES * averaged) + own


def is_sharded(config: GkdConfig, needed_bytes: int, device_bytes: int, workers: int) -> bool:
    """What `gkd.parallel` means for workers that would hold `needed_bytes` each, beside what a step computes."""
    if config.parallel != "auto":
        return config.parallel == "fsdp"
    return config.use_gpu and workers > 1 and needed_bytes > SHARE * device_bytes


def may_shard(config: GkdConfig) -> bool:
    """Whether workers may turn out to be sharded when they look at their devices."""
    return is_sharded(config, 1, 0, config.num_workers)


def looks_sharded(job: GkdJob, device: str, add_up: AllReduce) -> bool:
    """`is_sharded` for this worker and the others, who call it too and are told the same.

    By the number of workers that were asked for: with fewer (`gkd.min_workers`) the checkpoints are of the same kind.
    """
    workers = job.config.num_workers
    if job.config.parallel != "auto" or not may_shard(job.config):
        return is_sharded(job.config, 0, 0, workers)
    folder = locate(job.parent, job.revision)
    child = Checkpoint(job.child.local_folder(CHILD))
    needed = ddp_bytes(child, Checkpoint(folder), bool(job.heldout), job.config.average_weights)
    memory = torch.cuda.get_device_properties(device).total_memory
    votes = torch.tensor([float(is_sharded(job.config, needed, memory, workers))], device=device)
    add_up(votes)
    return bool(votes.item())
