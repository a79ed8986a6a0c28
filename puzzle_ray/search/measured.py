"""A whole child that was measured, and what a report says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from puzzle_ray.artifacts import Choices, LayerChoice, Measured
from puzzle_ray.search.tables import Answer

RungRows = Sequence[Mapping[str, Any]]  # of one child, see `puzzle_ray.distill.rungs.RungRow`


def kl_or_inf(kl: float | None) -> float:
    """NaN compares with nothing: were it first, it would stay the least."""
    return math.inf if kl is None or math.isnan(kl) else kl


@dataclass(frozen=True, eq=False)
class MeasuredAnswer:
    """A measured child: the searcher it comes from, the answer with its predicted score, and what was measured.

    `corrected` is its KL as predicted by the children measured before it, None where there was no such prediction. `kl_distilled` is its
    held-out KL after a short distillation, None where there was none. `also` names who else gave this answer, and `rungs` is what it was
    in a race.
    """

    origin: str
    answer: Answer
    measured: Measured
    corrected: float | None = None
    kl_distilled: float | None = None
    also: tuple[str, ...] = ()
    rungs: RungRows = ()

    @property
    def choices(self) -> Choices:
        return self.answer.architecture.choices

    @property
    def rank(self) -> tuple[float, float]:
        """Measured KL, then predicted score. The least is best; a KL that is no number is the worst."""
        return kl_or_inf(self.measured.kl), self.answer.architecture.objective

    def row(self) -> dict[str, Any]:
        """As a report has it."""
        a = self.answer.architecture
        extra = {"predicted_corrected": self.corrected, "kl_distilled": self.kl_distilled}
        return {
            "origin": self.origin,
            "predicted": a.objective,
            **asdict(self.measured),
            **{name: value for name, value in extra.items() if value is not None},
            **({"also": list(self.also), "rungs": list(self.rungs)} if self.rungs else {}),
            "batch_size": a.predicted.batch_size,
            "choices": [choice.label for choice in a.choices],
        }


def measured_kls(report: Mapping[str, Any] | None) -> dict[Choices, float]:
    """The KL of every whole child in the report of a pick, by its choices. Nothing without a report."""
    rows = [*report["candidates"], report["picked"]] if report else []
    return {tuple(LayerChoice(*label.split(" + ")) for label in row["choices"]): row["kl"] for row in rows}
