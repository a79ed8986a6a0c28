"""Children that were measured before one is picked, and who of them is distilled for a while before that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from puzzle_ray.artifacts import Choices, Measured
from puzzle_ray.search.tables import Answer

RungRows = Sequence[Mapping[str, Any]]  # of one child, see `puzzle_ray.distill.rungs.RungRow`
Distilled = Callable[[Sequence[Choices]], list[float]]  # children's held-out KLs after a short distillation
Race = Callable[[Sequence[Choices]], Sequence[RungRows]]  # what children were at every rung, and who went on from there

LOCAL_SEARCH = "local search"


def or_inf(kl: float | None) -> float:
    """NaN compares with nothing: were it first, it would stay the least."""
    return math.inf if kl is None or math.isnan(kl) else kl


@dataclass(frozen=True, eq=False)
class MeasuredAnswer:
    """A measured child: the searcher it comes from, the answer with its predicted score, and what was measured.

    `kl_distilled` is its held-out KL after a short distillation, None where there was none. `also` names who else gave this answer, and
    `rungs` is what it was in a race.
    """

    origin: str
    answer: Answer
    measured: Measured
    kl_distilled: float | None = None
    also: tuple[str, ...] = ()
    rungs: RungRows = ()

    @property
    def rank(self) -> tuple[float, float]:
        """Measured KL, then predicted score. The least is best; a KL that is no number is the worst."""
        return or_inf(self.measured.kl), self.answer.architecture.objective

    @property
    def choices(self) -> Choices:
        return self.answer.architecture.choices

    def report_row(self) -> dict[str, Any]:
        a = self.answer.architecture
        return {
            "origin": self.origin,
            "predicted": a.objective,
            **asdict(self.measured),
            **({} if self.kl_distilled is None else {"kl_distilled": self.kl_distilled}),
            **({"also": list(self.also), "rungs": list(self.rungs)} if self.rungs else {}),
            "batch_size": a.predicted.batch_size,
            "choices": [choice.label for choice in a.choices],
        }


def origin_of(searcher: str, number: int) -> str:
    """What the searcher's answers are called, counted from 1."""
    return searcher if number == 1 else f"{searcher} #{number}"


def distilled_best(found: Sequence[MeasuredAnswer], distilled: Distilled) -> tuple[list[MeasuredAnswer], MeasuredAnswer]:
    """All of them, with their KLs after a short distillation, and the one of least."""
    kls = distilled([one.choices for one in found])
    after = [replace(one, kl_distilled=kl) for one, kl in zip(found, kls, strict=True)]
    return after, min(after, key=lambda one: (or_inf(one.kl_distilled), one.rank))


def outcome(rungs: RungRows) -> str:
    """How a race ended for one who was in it."""
    last = rungs[-1]
    return "won" if last["goes_on"] else f"stopped after {last['step']} steps, {last['tokens']:,} tokens"


def finalists(found: Sequence[MeasuredAnswer], searcher: str, own: int, within: float) -> list[MeasuredAnswer]:
    """Who races, by KL: the `own` of least KL among the searcher's answers and what a local search found, and every answer of another
    kind, whoever else gave it. None whose KL is above `within` times the least of all.
    """

    def is_own(one: MeasuredAnswer) -> bool:
        return one.origin in (searcher, LOCAL_SEARCH) or one.origin.startswith(f"{searcher} #")

    ranked = sorted(found, key=lambda one: one.rank)
    first, least = [one for one in ranked if is_own(one)][:own], ranked[0].rank[0]
    limit = max(least, within * least)
    return [one for one in ranked if one.rank[0] <= limit and (one in first or one.also or not is_own(one))]


def raced_best(
    found: Sequence[MeasuredAnswer], racing: Sequence[MeasuredAnswer], race: Race
) -> tuple[list[MeasuredAnswer], MeasuredAnswer]:  # fmt: skip
    """All of them, with what those that race were at every rung, and the winner. One alone does not race."""
    if len(racing) < 2:
        return list(found), racing[0]
    rows = dict(zip(map(id, racing), race([one.choices for one in racing]), strict=True))
    after = [replace(one, rungs=rows.get(id(one), ())) for one in found]
    return after, next(one for one in after if one.rungs and one.rungs[-1]["goes_on"])
