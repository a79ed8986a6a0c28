"""Figures of devices for estimates: dense peak rates, memory bandwidth and memory size, as their makers publish them.

Rates are of dense matrix products with 32-bit accumulation, without sparsity. `float32` is the plain fp32 rate, which PyTorch uses by
default. Memory is what nvidia-smi shows.
Efficiencies, and the times per kernel and per step, are rules of thumb for serving engines with CUDA graphs. They are not measured.
Large products reach about 70 % of the peak rate, and streams about 80 % of the bandwidth. A kernel in a graph costs a few
microseconds, however little it does. Scheduling and sampling cost about a tenth of a millisecond per step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from puzzle_ray.plugins import did_you_mean

THIS_CPU = "cpu"
DTYPES = ("float32", "bfloat16", "float16", "fp8")


@dataclass(frozen=True)
class Device:
    """`tflops`: peak rate by dtype, in 10^12 operations per second. Bandwidth is in 10^9 bytes per second, memory in MiB."""

    name: str
    tflops: Mapping[str, float]
    bandwidth_gb_s: float
    memory_mib: float
    compute_efficiency: float = 0.7
    bandwidth_efficiency: float = 0.8
    kernel_us: float = 4.0
    step_us: float = 100.0

    def __post_init__(self) -> None:
        rates = {f"tflops.{name}": value for name, value in self.tflops.items()}
        positive = rates | {name: getattr(self, name) for name in ("bandwidth_gb_s", "memory_mib")}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise ValueError(f"device {self.name}: {name} = {value:g} must be above 0")
        for name in ("kernel_us", "step_us"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"device {self.name}: {name} = {getattr(self, name):g} must be 0 or more")
        for name in ("compute_efficiency", "bandwidth_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"device {self.name}: {name} = {getattr(self, name):g} must be above 0 and at most 1")


def _half(tflops: float) -> dict[str, float]:
    return {"bfloat16": tflops, "float16": tflops}


KNOWN_DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        # NVIDIA H100 Tensor Core GPU datasheet, SXM: fp32 67, bf16 1979 and fp8 3958 with sparsity; 80 GB at 3.35 TB/s
        Device("H100", {"float32": 67.0, **_half(989.4), "fp8": 1978.9}, 3350.0, 81_559.0),
        # NVIDIA H200 Tensor Core GPU datasheet, SXM: H100's rates; 141 GB at 4.8 TB/s
        Device("H200", {"float32": 67.0, **_half(989.4), "fp8": 1978.9}, 4800.0, 143_771.0),
        # NVIDIA A100 Tensor Core GPU datasheet, 80 GB SXM: fp32 19.5, bf16 312, no fp8; 2.039 TB/s
        Device("A100", {"float32": 19.5, **_half(312.0)}, 2039.0, 81_920.0),
        # NVIDIA DGX B200 datasheet, an eighth: fp8 72 with sparsity, half of it dense, bf16 half of that; 1,440 GB at 64 TB/s; fp32 by
        # the HGX B200 datasheet's 600
        Device("B200", {"float32": 75.0, **_half(2250.0), "fp8": 4500.0}, 8000.0, 183_359.0),
        # NVIDIA L40S datasheet: fp32 91.6, bf16 362.05 and fp8 733 without sparsity; 48 GB at 864 GB/s
        Device("L40S", {"float32": 91.6, **_half(362.05), "fp8": 733.0}, 864.0, 46_068.0),
        # NVIDIA Ada GPU architecture whitepaper, GeForce RTX 4090: fp32 82.6, bf16 165.2 and fp8 330.3 with fp32 accumulation;
        # 24 GB at 1,008 GB/s
        Device("RTX4090", {"float32": 82.6, **_half(165.2), "fp8": 330.3}, 1008.0, 24_564.0),
    )
}


def device_of(value: str | Mapping[str, Any]) -> Device | None:
    """A device by name, or by a mapping with a `name` and the figures that differ from a known device, or all figures.

    None for this machine's CPU. Raises ValueError, which says what to write.
    """
    given: dict[str, Any] = {"name": value} if isinstance(value, str) else dict(value)
    settings = [field.name for field in fields(Device)]
    for key in given:
        if key not in settings:
            raise ValueError(f"{key!r} is not of a device; {did_you_mean(str(key), settings)}")
    name = str(given.get("name", ""))
    if name == THIS_CPU:
        if len(given) > 1:
            raise ValueError("cpu is measured where the profile is made; give a device of your own another name")
        return None
    try:
        rates: dict[str, float] = {str(dtype): float(x) for dtype, x in dict(given.pop("tflops", {})).items()}
        given = {key: float(x) if key != "name" else name for key, x in given.items()}
    except (TypeError, ValueError):
        raise ValueError(f"device {name}: write numbers, such as tflops: {{bfloat16: 362}}, bandwidth_gb_s: 864") from None
    for dtype in rates:
        if dtype not in DTYPES:
            raise ValueError(f"device {name}: {dtype!r} is no dtype; {did_you_mean(dtype, DTYPES)}")
    known = next((device for key, device in KNOWN_DEVICES.items() if _plain(key) == _plain(name)), None)
    if known is not None:
        changed: dict[str, Any] = given | {"name": known.name, "tflops": {**known.tflops, **rates}}
        return replace(known, **changed)
    given |= {"tflops": rates} if rates else {}
    if missing := {"name", "tflops", "bandwidth_gb_s", "memory_mib"} - given.keys():
        hint = did_you_mean(name, [*KNOWN_DEVICES, THIS_CPU])
        raise ValueError(f"no device {name!r} is known; {hint}; or write a mapping that also has {', '.join(sorted(missing))}")
    return Device(**given)


def _plain(name: str) -> str:
    """`NVIDIA H100-SXM` -> `h100`."""
    words = name.lower().replace("-", " ").replace("_", " ").split()
    return "".join(word for word in words if word not in ("nvidia", "geforce", "sxm", "80gb"))
