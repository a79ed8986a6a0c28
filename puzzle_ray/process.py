"""How a process computes: on which device, with how many threads, and what happens to freed memory."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from puzzle_ray.errors import ClusterError

if TYPE_CHECKING:
    import torch

LITTLE = 0.25  # of what is in use: what may go back in a loop
_WORTH_BYTES = 256 << 20  # of freed memory, below which a loop gives none back
_LARGE_BYTES = 128 << 20  # of a block that goes back to the kernel when it is freed
_NOT_SMALL_BYTES = 16 << 20  # the same, where nothing large is kept
_THRESHOLDS = gc.get_threshold()  # as Python, or who runs us, has them


def num_cores() -> int:
    """Cores that this process may use: those it may run on, or fewer where its control group has a CPU quota, as in a container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(_read)
    return cores if quota is None else max(1, min(cores, int(quota)))


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def cpu_quota(read: Callable[[str], str | None]) -> float | None:
    """CPU time per time that the control groups of this process allow it, in cores; None where none of them says.

    `read` gives a file's content, or None where there is no such file. The strictest of a group and those above it holds. Where the
    path of `/proc/self/cgroup` is the host's, a container sees its own group at the root.
    """
    quotas: list[float] = []
    for line in (read("/proc/self/cgroup") or "").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        parts = [part for part in group.split("/") if part and part != ".."]
        for depth in range(len(parts) + 1):
            inside = "".join(f"/{part}" for part in parts[:depth])
            if hierarchy == "0" and not controllers:
                quota, period = [*(read(f"/sys/fs/cgroup{inside}/cpu.max") or "max").split(), "100000"][:2]
            elif "cpu" in controllers.split(","):
                folder = f"/sys/fs/cgroup/cpu{inside}"
                quota, period = read(f"{folder}/cpu.cfs_quota_us") or "-1", read(f"{folder}/cpu.cfs_period_us") or "100000"
            else:
                continue
            if quota.strip() not in ("max", "-1"):
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


@lru_cache(maxsize=1)
def _has_glibc() -> bool:
    """Asked once: elsewhere Python reads through its whole executable to answer."""
    return platform.libc_ver()[0] == "glibc"


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory in this process. Returns False where there is no glibc.

    By default, glibc returns every large activation to the kernel, and gets it back page by page, filled with zeros. That takes up to a
    quarter of a prefill on the CPU, and a twentieth to a tenth of block distillation. It also depends on what was freed before, so that
    layers cost more together than alone. See mallopt(3).

    Blocks of 128 MiB and more do go back. They are weights, heads and their gradients, not activations, and gaps of that size between
    kept blocks took 2 GiB in the distillation of a child with a vocabulary of 150,000.
    """
    if not _has_glibc():
        return False
    trim_threshold = -1  # M_TRIM_THRESHOLD of malloc.h
    return _give_back_from(_LARGE_BYTES) and bool(ctypes.CDLL(None).mallopt(trim_threshold, (1 << 31) - 1))


def _give_back_from(num_bytes: int) -> bool:
    """Blocks of this size and more come from the kernel, and go back to it when they are freed."""
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    return bool(ctypes.CDLL(None).mallopt(mmap_threshold, num_bytes))


@contextmanager
def nothing_large_kept() -> Iterator[None]:
    """While it is open, a process that keeps freed memory keeps no blocks of 16 MiB and more.

    For work on a few large tensors of several sizes. Those of a kind do not fit the gaps that others leave, where a few bytes of
    something else lie in them, so that such a process grows to more than it ever uses at once, by chance.
    """
    keeps = keep_freed_memory.cache_info().currsize > 0 and keep_freed_memory()
    if keeps:
        _give_back_from(_NOT_SMALL_BYTES)
    try:
        yield
    finally:
        if keeps:
            _give_back_from(_LARGE_BYTES)


class _Mallinfo2(ctypes.Structure):
    """What glibc says of its heaps, see mallinfo(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def give_back_freed_memory(share: float | None = None) -> bool:
    """Gives back to the kernel what this process has freed and keeps. Returns False where it does not.

    For the end of a phase: what it has freed lies in gaps between what stays, too scattered for what comes next. Pages that are needed
    again are filled with zeros first. So in a loop, give a `share`: nothing is given back where more is kept than this share of what is
    in use, or less than 256 MiB. Beside that much work with what is in use, getting the pages again takes no time that counts.
    """
    if not _has_glibc():
        return False
    libc = ctypes.CDLL(None)
    if share is not None:
        private = _private_bytes()
        if private < _WORTH_BYTES * (1 + 1 / share):  # with any less, one of the two is not so; asking glibc takes longer
            return False
        if not hasattr(libc, "mallinfo2"):  # before glibc 2.33
            return False
        libc.mallinfo2.restype = _Mallinfo2
        heap = libc.mallinfo2()
        in_use = heap.uordblks + heap.hblkhd
        if not _WORTH_BYTES <= private - in_use <= share * in_use:
            return False
    return bool(libc.malloc_trim(0))


def _private_bytes() -> int:
    """Resident memory of this process that no file and no other process has; 0 where nobody says."""
    pages = (_read("/proc/self/statm") or "0 0 0").split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def start_quickly() -> None:
    """Makes Python look for dead reference cycles less often, until this process computes.

    Importing torch and transformers makes half a million objects, none of which dies. By its default thresholds Python looks through
    them again and again, which takes over a quarter of the CPU time of a worker's start.
    """
    gc.set_threshold(20_000, 20, 10)


def compute_with(num_threads: int) -> None:
    """Prepares a process for computing: sets its number of threads, and keeps freed memory for the next activations.

    Python looks for dead cycles as often as by default again: some of them hold large tensors.
    """
    import torch

    gc.set_threshold(*_THRESHOLDS)
    torch.set_num_threads(num_threads)
    keep_freed_memory()


@contextmanager
def computing_with(num_threads: int) -> Iterator[None]:
    """`compute_with`, and afterwards as many threads as before."""
    import torch

    before = torch.get_num_threads()
    compute_with(num_threads)
    try:
        yield
    finally:
        compute_with(before)


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


def devices_for(num_gpus: float) -> list[torch.device]:
    """Those that a process computes on: the CPU, the GPU that it has a share of, or several GPUs.

    Raises ClusterError where more GPUs are reserved than torch can use.
    """
    import torch

    first = device_for(num_gpus)
    if num_gpus <= 1:
        return [first]
    if torch.cuda.device_count() < num_gpus:
        problem = f"torch sees {torch.cuda.device_count()} GPUs in a process that was given {num_gpus:g}"
        raise ClusterError("cluster", problem, "set CUDA_VISIBLE_DEVICES on every node to all of its GPUs, or ask for fewer")
    return [torch.device("cuda", number) for number in range(int(num_gpus))]


def free_bytes(device: torch.device) -> int | None:
    """What this process could still allocate on a GPU; None for a CPU. What torch keeps for reuse counts as free."""
    import torch

    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def available_bytes(device: torch.device) -> int | None:
    """What this process could still allocate on a device; None where nobody says. On Linux, a CPU has what the kernel calls available."""
    if device.type == "cuda":
        return free_bytes(device)
    for line in (_read("/proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def allow_tf32(allowed: bool) -> None:
    """Whether products of float32 matrices on a GPU may round their factors to TF32. On a CPU it changes nothing."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = allowed
