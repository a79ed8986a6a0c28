"""How a process computes: on which device, with how many threads, and what happens to freed memory."""

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
    """Tells glibc to keep freed memory in this process. Returns False where there is no glibc.

    By default, glibc returns every large activation to the kernel, and gets it back page by page, filled with zeros. That takes up to a
    quarter of a prefill on the CPU, and a twentieth to a tenth of block distillation. It also depends on what was freed before, so that
    layers cost more together than alone. See mallopt(3).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(mmap_threshold, 1 << 30)) and bool(mallopt(trim_threshold, (1 << 31) - 1))


def compute_with(num_threads: int) -> None:
    """Prepares a process for computing: sets its number of threads, and keeps freed memory for the next activations."""
    import torch

    torch.set_num_threads(num_threads)
    keep_freed_memory()


def device_for(num_gpus: float) -> torch.device:
    """The GPU that is reserved for this process, or the CPU where none is.

    Raises ClusterError where a GPU is reserved that torch cannot use.
    """
    import torch

    if not num_gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        problem = f"torch {torch.__version__} sees no GPU in a process that was given {num_gpus:g}"
        raise ClusterError("cluster", problem, "install a CUDA build of torch on every node, or ask for no GPUs")
    return torch.device("cuda")
