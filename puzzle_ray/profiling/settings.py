"""Settings of the profile."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from puzzle_ray.artifacts import Scenario
from puzzle_ray.profiling.devices import KNOWN_DEVICES, THIS_CPU, device_of
from puzzle_ray.profiling.scenarios import AUTO, DEFAULT_SCENARIO, scenario_of
from puzzle_ray.settings import Count, NonNegative, Positive, Section


class ProfileConfig(Section):
    """What is measured, and where.

    `resources` and `label_selector` pin the profilers to nodes, e.g. {"accelerator_type:H100": 0.001}.
    `scenario`: see `puzzle_ray.profiling.scenarios`. `batch_sizes: auto` (or `scenario.batch_size: auto`) stands for the powers of two
    at which some child fits in `memory_mib` (or `search.limits.memory_mib`). The parent is compared at the largest that it fits.
    Engine `roofline` estimates instead of measuring. Its `device` is a name, figures, or `cpu` (see `puzzle_ray.profiling.devices`).
    Engine `puzzle` measures with what `serve-child` serves with, HTTP left out. `request_ms` is what HTTP adds: the server's time for a
    request besides that (`benchmarks.serving_prediction` measures it). It counts in every prediction, for parent and child alike.
    """

    engine: str = "torch"  # or puzzle, roofline, vllm, tensorrt_llm, or package.module:ATTRIBUTE
    device: str | dict[str, Any] | None = None  # the one that roofline estimates for
    scenario: Annotated[Scenario, BeforeValidator(scenario_of)] = DEFAULT_SCENARIO
    batch_sizes: tuple[Count, ...] | Literal["auto"] = ()  # in addition to the scenario's own
    max_batch_size: Count = 256  # of `auto`
    memory_mib: Positive | None = None  # of the device; no child needs more. With `auto`, a known device's own by default
    reserved_mib: NonNegative = 0.0  # part of it that the engine itself needs; activations are counted apart
    dtype: Literal["float32", "bfloat16", "float16", "fp8"] = "float32"
    request_ms: NonNegative = 0.0
    repeats: Annotated[int, Field(ge=2)] = 5
    stack: Count = 4  # stacks have twice as many layers; the second no-op stack has this many
    num_profilers: Count = 1
    num_gpus: NonNegative = 0
    resources: dict[str, float] = {}
    label_selector: dict[str, str] = {}

    @model_validator(mode="before")
    @classmethod
    def _auto_batch_size(cls, values: Any) -> Any:
        """`scenario.batch_size: auto` is `batch_sizes: auto`."""
        if not isinstance(values, dict):
            return values
        scenario, sizes = values.get("scenario"), values.get("batch_sizes")
        if isinstance(sizes, str) and sizes != AUTO:
            raise ValueError(f"batch_sizes = {sizes!r}: write whole numbers, such as [8, 16], or auto")
        if not isinstance(scenario, dict) or scenario.get("batch_size") != AUTO:
            return values
        if sizes not in (None, AUTO, [], ()):
            raise ValueError(f"scenario.batch_size auto beside batch_sizes {sizes}; leave batch_sizes out")
        return values | {"scenario": scenario | {"batch_size": 1}, "batch_sizes": AUTO}

    @model_validator(mode="after")
    def _device_for_an_estimate(self) -> ProfileConfig:
        if self.engine == "roofline":
            if self.device is None:
                raise ValueError(
                    f"engine roofline needs a device; set profile.device to one of {', '.join([*KNOWN_DEVICES, THIS_CPU])}"
                )
            device = device_of(self.device)
            if self.dtype == "fp8" and device is None:
                raise ValueError("device cpu has no fp8; set profile.dtype to float32 or bfloat16")
        elif self.device is not None and ":" not in self.engine:
            problem = f"device is for engine roofline, and engine is {self.engine}, which measures where it runs"
            raise ValueError(f"{problem}; drop profile.device, or set profile.engine=roofline")
        if self.dtype == "fp8" and self.engine in ("torch", "puzzle"):
            problem = "dtype fp8 is for engines roofline, vllm and tensorrt_llm"
            raise ValueError(f"{problem}; {self.engine} takes float32, bfloat16 or float16")
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that a profile depends on. On which nodes it is measured is told by what they are, which its key has too."""
        aside = {"num_profilers", "resources", "label_selector", "memory_mib", "reserved_mib"}
        if self.batch_sizes != AUTO:
            aside.add("max_batch_size")
        if not self.request_ms:
            aside.add("request_ms")
        return self.model_dump(mode="json", exclude=aside)

    def memory(self) -> dict[str, float]:
        """What the device has, and the engine keeps of it; empty where it is not known. A search depends on it, a profile does not."""
        return {} if self.memory_mib is None else {"memory_mib": self.memory_mib, "reserved_mib": self.reserved_mib}
