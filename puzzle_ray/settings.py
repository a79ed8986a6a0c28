"""What every section of the settings is made of. Unknown keys are refused; nothing changes after it was read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

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


Name = Annotated[str, Field(min_length=1)]  # of a place: a shell variable that is not set leaves ""


_WITH_EXPONENT = re.compile(r"\d+(\.\d*)?[eE]\+?\d{1,2}")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_as_yaml_has_them(cls, given: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` and `on` as true, which would count as the number 1, and 1e6, without a point, as a text."""
        types = set(types_in(cls.model_fields[str(info.field_name)].annotation))
        if not types & {int, float} or types & {bool, Any}:
            return given
        if any(isinstance(value, bool) for value in _values_in(given)):
            raise ValueError("write a number")
        return given if str in types else _whole(given)


def _whole(given: Any) -> Any:
    """The same with whole numbers for texts such as 1e6."""
    if isinstance(given, dict):
        return {name: _whole(value) for name, value in given.items()}
    if isinstance(given, list | tuple):
        return type(given)(_whole(value) for value in given)
    if isinstance(given, str) and _WITH_EXPONENT.fullmatch(given) and float(given).is_integer():
        return int(float(given))
    return given


def _values_in(given: Any) -> Iterator[Any]:
    if isinstance(given, dict):
        given = list(given.values())
    if not isinstance(given, list | tuple):
        yield given
        return
    for value in given:
        yield from _values_in(value)


def types_in(annotation: Any) -> Iterator[Any]:
    parts = get_args(annotation)
    if not parts:
        yield annotation
    for part in parts:
        yield from types_in(part)
