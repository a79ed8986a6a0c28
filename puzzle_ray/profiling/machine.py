"""What identifies a measuring machine besides its device's name: driver, clocks, governor, threads."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

GPU_FACTS = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "temperature.gpu",
)  # MHz, MHz, MHz, W, C
TIMEOUT_S = 20.0


def cpu_name() -> str:
    """The CPU's model name. On Linux it is read from /proc, since `platform.processor()` gives at most the architecture there."""
    return next(iter(_cpuinfo("model name")), platform.processor() or platform.machine())


def _cpuinfo(field: str) -> list[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return [line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == field]


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What can be read here without special rights. Read right after timing, so that clocks are those under load."""
    return _gpu_facts(device) if device.type == "cuda" else _cpu_facts()


def _cpu_facts() -> dict[str, Any]:
    facts: dict[str, Any] = {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
    clocks = [float(value) for value in _cpuinfo("cpu MHz")]
    if clocks:
        facts["cpu_mhz"] = round(fmean(clocks))
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor.is_file():
        facts["governor"] = governor.read_text().strip()
    return facts


def _gpu_facts(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    facts: dict[str, Any] = {"memory_mib": properties.total_memory >> 20, "cuda": torch.version.cuda}
    if shutil.which("nvidia-smi") is None:
        return facts
    words = ["nvidia-smi", f"--id=GPU-{properties.uuid}", f"--query-gpu={','.join(GPU_FACTS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return facts
    return facts | parse_gpu_facts(done.stdout)


def parse_gpu_facts(line: str) -> dict[str, Any]:
    """A line of nvidia-smi's answer for GPU_FACTS, by name. Values that it does not know are left out."""
    facts: dict[str, Any] = {}
    for name, text in zip(GPU_FACTS, (part.strip() for part in line.strip().split(",")), strict=False):
        known = text and not text.startswith("[")
        if known and name == "driver_version":
            facts[name] = text
        elif known:
            facts[name.replace(".", "_")] = float(text)
    return facts
