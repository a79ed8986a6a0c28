"""What identifies the machine a measurement was taken on, beside the device's name: driver, clocks, governor, threads."""

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
    """`platform.processor()` is empty or only the architecture on Linux."""
    return next(iter(_cpuinfo("model name")), platform.processor() or platform.machine())


def _cpuinfo(field: str) -> list[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return [line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == field]


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What can be read here without rights; what cannot is left out. Read right after timing, so clocks are those under load."""
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
    return facts | parsed(done.stdout)


def parsed(line: str) -> dict[str, Any]:
    """A line of nvidia-smi's answer to GPU_FACTS; what it does not know is left out."""
    found: dict[str, Any] = {}
    for name, text in zip(GPU_FACTS, (part.strip() for part in line.strip().split(",")), strict=False):
        known = text and not text.startswith("[")
        if known and name == "driver_version":
            found[name] = text
        elif known:
            found[name.replace(".", "_")] = float(text)
    return found
