"""Settings of the evaluation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from puzzle_ray.settings import Count, Section


class EvaluateConfig(Section):
    """The evaluation of finished models: predictions on held-out text, speed, and a sample."""

    tokens: Count = 32_768  # of held-out text
    micro_batch_tokens: Count = 2048  # in one forward
    repeats: Annotated[int, Field(ge=1)] = 5  # timings of every model
    prompt: str = "Once upon a time"
    sample_tokens: Count = 48  # generated behind the prompt

    def sequences(self, length: int) -> int:
        """Of so many tokens each, in one forward."""
        return max(1, self.micro_batch_tokens // length)
