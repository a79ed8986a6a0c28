"""Children that were measured before one is picked, and who of them is distilled for a while before that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from puzzle_ray.artifacts import Choices
from puzzle_ray.search.local_search import LOCAL_SEARCH
from puzzle_ray.search.measured import MeasuredAnswer, RungRows, kl_or_inf

Distilled = Callable[[Sequence[Choices]], list[float]]  # children's held-out KLs after a short distillation
Race = Callable[[Sequence[Choices]], Sequence[RungRows]]  # what children were at every rung, and who went on from there


def origin_of(searcher: str, number: int) -> str:
    """What the searcher's answers are called, counted from 1."""
    return searcher if number == 1 else f"{searcher} #{number}"


def corrected_by(searcher: str) -> str:
    """What the searcher is called where it answers to corrected scores."""
    return f"{searcher}, corrected"


def distilled_best(found: Sequence[MeasuredAnswer], distilled: Distilled) -> tuple[list[MeasuredAnswer], MeasuredAnswer]:
    """All of them, with their KLs after a short distillation, and the one of least."""
    kls = distilled([one.choices for one in found])
    after = [replace(one, kl_distilled=kl) for one, kl in zip(found, kls, strict=True)]
    return after, min(after, key=lambda one: (kl_or_inf(one.kl_distilled), one.rank))


def outcome(rungs: RungRows) -> str:
    """How a race ended for one who was in it."""
    last = rungs[-1]
    return "won" if last["goes_on"] else f"stopped after {last['step']} steps, {last['tokens']:,} tokens"


def finalists(found: Sequence[MeasuredAnswer], searcher: str, own: int, within: float) -> list[MeasuredAnswer]:
    """Who races, by KL: the `own` of least KL among the searcher's answers and what a local search found, and every answer of another
    kind, whoever else gave it. None whose KL is above `within` times the least of all.
    """
    names = {LOCAL_SEARCH, searcher, corrected_by(searcher)}

    def is_own(one: MeasuredAnswer) -> bool:
        return one.origin.partition(" #")[0] in names

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
