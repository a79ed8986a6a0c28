"""Where a process computes, and what it keeps."""

import platform
import subprocess
import sys

import pytest
import torch

from puzzle_ray.errors import ClusterError
from puzzle_ray.process import computing_with, cpu_quota, device_for


def test_without_a_gpu_of_its_own_a_process_computes_on_the_cpu():
    assert device_for(0) == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_cannot_see_is_an_error_that_says_so():
    with pytest.raises(ClusterError, match="sees no GPU in a process that was given 0.5.*CUDA build"):
        device_for(0.5)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc")
def test_freed_memory_is_kept_for_the_next_activations():
    """Of twenty large tensors one after the other the last ones find their pages there."""
    script = """
import resource, torch
from puzzle_ray.process import compute_with
compute_with(1)
for number in range(20):
    if number == 15:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 22)  # 16 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    faults, threads = map(int, done.stdout.split())
    assert faults < 100 and threads == 1, f"a page is 4 KiB, a tensor 4096 of them; {faults} faults"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (
            {
                "/proc/self/cgroup": "0::/a/b\n",
                "/sys/fs/cgroup/a/cpu.max": "50000 100000",
                "/sys/fs/cgroup/a/b/cpu.max": "400000 100000",
            },
            0.5,
        ),
        ({"/proc/self/cgroup": "0::/on/the/host\n", "/sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        (
            {
                "/proc/self/cgroup": "3:cpuset:/\n2:cpu,cpuacct:/docker/x\n0::/\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000\n",
            },
            4,
        ),
        (
            {
                "/proc/self/cgroup": "1:cpu:/\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_a_quota_on_cpu_time_is_read_as_cores(files, cores):
    """Control groups of version 2 and 1, and of a group above this process' own."""
    assert cpu_quota(files.get) == cores


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc")
def test_what_is_larger_than_activations_goes_back():
    script = """
import psutil, torch
from puzzle_ray.process import compute_with
compute_with(1)
large = torch.ones(1 << 26)  # 256 MiB
held = psutil.Process().memory_info().rss
del large
print(held - psutil.Process().memory_info().rss)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 200 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc")
def test_for_a_while_nothing_large_is_kept():
    script = """
import psutil, torch
from puzzle_ray.process import compute_with, nothing_large_kept
compute_with(1)
def kept():
    blocks = [torch.ones(1 << 24) for _ in range(4)]  # 64 MiB each
    held = psutil.Process().memory_info().rss
    del blocks
    return 256 - (held - psutil.Process().memory_info().rss >> 20)
with nothing_large_kept():
    during = kept()
print(during, kept())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    during, after = map(int, done.stdout.split())
    assert during < 32 and after > 192


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc")
def test_what_lies_in_gaps_goes_back_where_it_is_asked_for_and_is_not_much_beside_what_stays():
    script = """
import psutil, torch
from puzzle_ray.process import compute_with, give_back_freed_memory
compute_with(1)
blocks = [torch.ones(1 << 19) for _ in range(512)]  # 2 MiB each
rss = lambda: psutil.Process().memory_info().rss
before = rss()
del blocks[1::2]
print(before - rss(), give_back_freed_memory(0.01), before - rss(), give_back_freed_memory(2.0), before - rss())
few = torch.ones(1 << 19)
del blocks
print(give_back_freed_memory())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kept, did_not, still, did, gone, last = done.stdout.split()
    assert int(kept) < 64 << 20 and did_not == "False" and int(still) < 64 << 20
    assert did == "True" and int(gone) > 400 << 20 and last == "True"


def test_a_worker_looks_for_dead_cycles_less_often_until_it_computes():
    script = """
import gc
usual = gc.get_threshold()
import actors.parent_shard
assert gc.isenabled() and gc.get_threshold()[0] > 10 * usual[0], gc.get_threshold()
from puzzle_ray.process import compute_with
compute_with(1)
assert gc.get_threshold() == usual, gc.get_threshold()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_afterwards_there_are_as_many_threads_as_before_whatever_happened():
    before = torch.get_num_threads()
    try:
        with pytest.raises(ZeroDivisionError), computing_with(before + 1):
            assert torch.get_num_threads() == before + 1
            1 / 0  # noqa: B018
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(before)
