"""How a process computes: where, with how many threads, and what it does with memory it has freed."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import lru_cache
from typing import TYPE_CHECKING

from puzzle_ray.errors import ClusterError

if TYPE_CHECKING:
    import torch


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory in this process, where it is used; says whether it did.

    By default every large activation is handed back to the kernel and comes again page by page, zeroed: up to a quarter of a prefill
    on the CPU, a twentieth to a tenth of block distillation; and how much depends on what was freed before, so that layers cost more
    together than alone. See mallopt(3).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(mmap_threshold, 1 << 30)) and bool(mallopt(trim_threshold, (1 << 31) - 1))


def compute_with(num_threads: int) -> None:
    """Readies a process that is there to compute: so many threads, and freed memory is kept for the next activations."""
    import torch

    torch.set_num_threads(num_threads)
    keep_freed_memory()


def device_for(num_gpus: float) -> torch.device:
    """The GPU that was set aside for this process, or the CPU where none was.

    Raises ClusterError where one was and torch cannot use it.
    """
    import torch

    if not num_gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        problem = f"torch {torch.__version__} sees no GPU in a process that was given {num_gpus:g}"
        raise ClusterError("cluster", problem, "install a CUDA build of torch on every node, or ask for no GPUs")
    return torch.device("cuda")
