"""Settings of the evaluation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from puzzle_ray.settings import Count, Section


class EvaluateConfig(Section):
    tokens: Count = 32_768
    repeats: Annotated[int, Field(ge=1)] = 5
    prompt: str = "Once upon a time"
    sample_tokens: Count = 48
