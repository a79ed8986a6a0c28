"""What every section of the settings is made of. Unknown keys are refused; nothing changes after it was read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(gt=0, le=1)]


Count = Annotated[int, Field(ge=1, le=2**62)]


Positive = Annotated[float, Field(gt=0)]


NonNegative = Annotated[float, Field(ge=0)]


def _whole_parts(share: float) -> float:
    if share and abs(1 / share - round(1 / share)) > 1e-2 / share:
        raise ValueError("one process takes a whole part of one GPU; write 0, 1, 0.5, 0.333, 0.25 ...")
    return share


GpuShare = Annotated[float, Field(ge=0, le=1), AfterValidator(_whole_parts)]


DType = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
