"""Where a process computes, and what it keeps."""

import platform
import subprocess
import sys

import pytest
import torch

from puzzle_ray.errors import ClusterError
from puzzle_ray.process import device_for


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
