"""What an evaluation is told besides the models and their text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from puzzle_ray.artifacts import Architecture, Scenario
from puzzle_ray.evaluation.settings import EvaluateConfig
from puzzle_ray.scoring.downstream import QuestionBatch


@dataclass(frozen=True)
class Comparison:
    """How models are compared, in this process or in another.

    They are timed in `scenario` and `dtype`, which is the profile's, by its `engine`. `architecture` is that of the children: what was
    predicted of them, and their batch size; without it nothing was. With `questions`, every model also answers these. `separator` is
    the token that documents begin with, where attention does not cross them (see `puzzle_ray.data.packing`). `trusted`: the tokenizer's
    own code may run.
    """

    config: EvaluateConfig
    scenario: Scenario
    dtype: str = "float32"
    architecture: Architecture | None = None
    questions: Sequence[QuestionBatch] = ()
    separator: int | None = None
    trusted: bool = False
    engine: str = "torch"

    @property
    def timed_in(self) -> str:
        """The dtype of weights: PyTorch computes in none of 8 bits."""
        return "bfloat16" if self.dtype == "fp8" else self.dtype
