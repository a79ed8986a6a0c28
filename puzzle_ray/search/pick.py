"""Picks an architecture by measuring whole children.

The sum of replace-one scores only predicts the KL of a whole child. It is most wrong where whole layers are dropped.
So the best distinct answers of the search are measured as whole children. Each measured child corrects the prediction of those that are
not (`puzzle_ray.search.correction`): a child that is not worth it any more is left out, and where the sums were far off, the search is
done again with corrected scores, as long as that finds better children. A local search exchanges blocks within the budget as long as
the measured KL falls. Where it is configured, finalists are distilled for a while, or race on the schedule of the whole distillation, and
what is best then is picked. The report says how far the sums of scores were off.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from puzzle_ray.artifacts import Architecture, Choices, Measure
from puzzle_ray.errors import ConfigError, Infeasible, OutOfTime
from puzzle_ray.search.correction import Correction, best_unmeasured
from puzzle_ray.search.finalists import (
    Distilled,
    Race,
    corrected_by,
    distilled_best,
    finalists,
    origin_of,
    raced_best,
)
from puzzle_ray.search.interactions import measure_interactions
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.local_search import local_search
from puzzle_ray.search.measured import MeasuredAnswer
from puzzle_ray.search.problem import Floats
from puzzle_ray.search.restricted import without
from puzzle_ray.search.searcher import Options
from puzzle_ray.search.tables import Answer, Tables

if TYPE_CHECKING:
    from puzzle_ray.search.settings import SearchConfig
    from puzzle_ray.search.setup import SearchSetup

Found = dict[str, Answer]  # answers by what each is called

PICKED = "picked.json"
AT_FIRST = 2  # answers that are measured before others are left out: one child says nothing of what sets children apart


@dataclass(frozen=True)
class PickOptions:
    """What is measured: `count` answers of `searcher`, one without each family of `without`, up to `corrections` answers to corrected
    scores, one answer of each rival, then `steps` steps of local search.

    The answers of `searcher` differ from each other in at least `min_different_layers` layers. After the first two, an answer is left out
    whose KL is predicted, by the children measured so far, above `predicted_within` times the least KL; none is where that is None.
    An answer to corrected scores is measured where it is predicted below the least KL, or where the least KL is above `rivals_from` times
    its sum of scores and the one before it was better than all before. Rivals are measured in that case only, too, or `rivals_always`.
    Where the scores are no KLs, all answers and rivals are measured, and none to corrected scores.
    `interaction_blocks`: all pairs of this many of the most used blocks are measured too. `race_own` and `race_within`: who races, see
    `finalists`.
    """

    searcher: str = "mip"
    count: int = 1
    min_different_layers: int = 1
    rivals: tuple[str, ...] = ()
    rivals_from: float = 0.0
    without: tuple[str, ...] = ()
    steps: int = 0
    interaction_blocks: int = 0
    predicted_within: float | None = None
    corrections: int = 0
    rivals_always: bool = False
    race_own: int = 1
    race_within: float = math.inf


def pick(
    tables: Tables,
    limits: Limits,
    picking: PickOptions,
    searching: Options,
    measure: Measure,
    distilled: Distilled | None = None,
    race: Race | None = None,
) -> tuple[Architecture, dict[str, Any]]:
    """The architecture of least measured KL, and a JSON-able report of all that was tried. Raises Infeasible.

    With `distilled` the one of least KL after the short distillation that it does, with `race` the one that wins it.
    """
    search = _Search(tables, limits, picking, searching)
    measured = _Candidates(picking, measure)
    numbered = search.numbered()
    apart = search.without_families(numbered)
    early = dict(islice(numbered.items(), None if picking.predicted_within is None else AT_FIRST))
    measured.add(early | apart)
    measured.add(measured.worth_it({name: answer for name, answer in numbered.items() if name not in early}, search.left_out))
    _measure_corrected(search, measured)
    if reason := measured.rivals_spared():
        search.left_out.update(dict.fromkeys(picking.rivals, reason))
    else:
        rivals = search.rivals([*numbered.values(), *(c.answer for c in measured.found)])
        measured.add(measured.worth_it(rivals, search.left_out))
    candidates, best = measured.found, measured.best
    trail: list[dict[str, Any]] = []
    best = local_search(tables, best, picking.steps, measure, trail)
    every, count = candidates if best in candidates else [*candidates, best], len(candidates)
    if distilled is not None:
        every, best = distilled_best(every, distilled)
    if race is not None:
        every = [replace(c, also=tuple(search.also.get(c.choices, ()))) for c in every]
        every, best = raced_best(every, finalists(every, picking.searcher, picking.race_own, picking.race_within), race)
    candidates = every[:count]
    first, last = candidates[0].answer.architecture, best.answer.architecture
    same = last.choices == first.choices
    own = numbered | apart | {c.origin: c.answer for c in candidates if c.origin not in picking.rivals}
    architecture = replace(
        last,
        searcher=picking.searcher if same else f"{picking.searcher}, measured",
        bound=min(first.bound, last.objective),
        status=first.status if same else "measured",
        solve_s=sum(answer.architecture.solve_s for answer in own.values()),
        unsolved_batch_sizes=first.unsolved_batch_sizes,
    )
    children = [c.answer.architecture.choices for c in candidates]
    pairs = measure_interactions(children, last.choices, picking.interaction_blocks, measure)
    told = {"left_out": search.left_out, "local_search": trail}
    report = _report(candidates, best, first, told) | {"interactions": pairs}
    return architecture, report | ({} if race is None else {"race": [c.row() for c in every if c.rungs]})


def _report(
    candidates: Sequence[MeasuredAnswer], best: MeasuredAnswer, first: Architecture, told: Mapping[str, Any]
) -> dict[str, Any]:
    sums, kls = [c.answer.architecture.objective for c in candidates], [c.measured.kl for c in candidates]
    return {
        "metric": first.metric,
        "tokens": best.measured.tokens,
        "picked": best.row(),
        "candidates": [c.row() | {"layers_unlike_first": _distance(c, first)} for c in candidates],
        **told,
        "prediction": prediction_error(sums, kls),
    }


class _Candidates:
    """The children measured so far, and what they say of others."""

    def __init__(self, picking: PickOptions, measure: Measure) -> None:
        self.picking, self.measure = picking, measure
        self.found: list[MeasuredAnswer] = []

    @property
    def best(self) -> MeasuredAnswer:
        return min(self.found, key=lambda c: c.rank)

    @property
    def far_off(self) -> bool:
        """Whether the least KL is far above its sum of scores."""
        best = self.best
        return best.measured.kl > self.picking.rivals_from * best.answer.architecture.objective

    def correction(self) -> Correction | None:
        """What the measured children say of others' KLs; None where they say nothing, or where scores are no KLs."""
        if self.found[0].answer.architecture.metric != "kl":
            return None
        return Correction.fitted([(c.answer, c.measured.kl) for c in self.found])

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Measures all of them, side by side where there are workers for that."""
        if answers:
            predicts = self.found and (self.picking.predicted_within is not None or self.picking.corrections)
            correction = self.correction() if predicts else None
            predicted = [None if correction is None else correction.kl(answer) for answer in answers.values()]
            found = self.measure([answer.architecture.choices for answer in answers.values()])
            self.found += [MeasuredAnswer(*x) for x in zip(answers, answers.values(), found, predicted, strict=True)]

    def worth_it(self, answers: Found, left_out: dict[str, str]) -> Found:
        """Those whose predicted KL is not far above the least. The reason is added to `left_out` for the others."""
        within = self.picking.predicted_within
        correction = None if within is None else self.correction()
        if within is None or correction is None:
            return answers
        least, kls = self.best.measured.kl, {name: correction.kl(answer) for name, answer in answers.items()}
        hopeless = {name: kl for name, kl in kls.items() if kl > within * least}
        left_out |= {
            n: f"its predicted KL, {kl:.4g}, is above {within:g} times the least, {least:.4g}" for n, kl in hopeless.items()
        }
        return {name: answer for name, answer in answers.items() if name not in hopeless}

    def rivals_spared(self) -> str:
        """Why rivals are not measured; empty where they are."""
        architecture, kl = self.best.answer.architecture, self.best.measured.kl
        if not self.picking.rivals or self.picking.rivals_always:
            return ""
        if architecture.metric != "kl" or self.far_off or math.isnan(kl):
            return ""
        return f"the KL, {kl:.4g}, is not above {self.picking.rivals_from:g} times its prediction, {architecture.objective:.4g}"


def _measure_corrected(search: _Search, measured: _Candidates) -> None:
    """Searches with corrected scores and measures what is found, one child after another, as each corrects the scores again."""
    better = True
    for number in range(1, search.picking.corrections + 1):
        correction, best = measured.correction(), measured.best
        if correction is None:
            return
        name = origin_of(corrected_by(search.picking.searcher), number)
        try:
            answer = search.corrected(correction, [c.answer.architecture.choices for c in measured.found])
        except (Infeasible, OutOfTime, ConfigError) as error:
            search.left_out[name] = str(error)
            return
        predicted = correction.kl(answer)
        if predicted >= best.measured.kl and not (measured.far_off and better):
            search.left_out[name] = f"its predicted KL, {predicted:.4g}, is not below the least, {best.measured.kl:.4g}"
            return
        measured.add({name: answer})
        better = measured.best is not best


@dataclass(frozen=True)
class _Search:
    """The answers of searchers within the limits. For one that was not found, the reason is added to `left_out`, and who gave an answer
    that was there already is added to `also`.
    """

    tables: Tables
    limits: Limits
    picking: PickOptions
    searching: Options
    left_out: dict[str, str] = field(default_factory=dict)
    also: dict[Choices, list[str]] = field(default_factory=dict)

    def numbered(self) -> Found:
        """The searcher's answers, best first. Raises Infeasible, or OutOfTime where not even one was found in time."""
        found: Found = {}
        picking = self.picking
        answers = self.tables.answers(self.limits, picking.searcher, picking.min_different_layers, self.searching)
        try:
            for answer in islice(answers, picking.count):
                found[origin_of(picking.searcher, len(found) + 1)] = answer
        except (Infeasible, OutOfTime) as error:
            if not found:
                raise
            if isinstance(error, OutOfTime):  # else there are no more answers
                self.left_out[origin_of(picking.searcher, len(found) + 1)] = str(error)
        return found

    def without_families(self, known: Found) -> Found:
        """The best answer without each family of variants, unless it is `known`."""
        found: Found = {}
        for family in self.picking.without:
            name = f"{self.picking.searcher} without {family}"
            try:
                tables, how = without(self.tables, family), self.searching
                answer = tables.search(self.limits, searcher=self.picking.searcher, options=how)[0]
            except (Infeasible, OutOfTime, ConfigError) as error:  # the searcher may need that family
                self.left_out[name] = str(error)
            else:
                self._add(found, name, answer, known.values())
        return found

    def rivals(self, known: Sequence[Answer]) -> Found:
        """Answers of rivals that are not `known`."""
        found: Found = {}
        for name in self.picking.rivals:
            try:
                self._add(found, name, self.tables.search(self.limits, searcher=name, options=self.searching)[0], known)
            except (Infeasible, ConfigError) as error:  # this rival has no answer within the limits; the others are measured
                self.left_out[name] = str(error)
        return found

    def corrected(self, correction: Correction, known: Sequence[Choices]) -> Answer:
        """The searcher's best answer to corrected scores that is not `known`. Raises Infeasible, OutOfTime or ConfigError."""
        return best_unmeasured(self.tables, self.limits, self.picking.searcher, self.searching, correction, known)

    def _add(self, found: Found, name: str, answer: Answer, known: Iterable[Answer]) -> None:
        """Unless it is there."""
        choices = answer.architecture.choices
        if any(choices == other.architecture.choices for other in (*known, *found.values())):
            self.also.setdefault(choices, []).append(name)
        else:
            found[name] = answer


def candidate_choices(setup: SearchSetup, search: SearchConfig) -> list[Choices]:
    """The choices that a run's settings would measure, or take where nothing is measured, but for those to corrected scores, which only
    measured children tell. Raises Infeasible."""
    own = _Search(setup.tables, search.limits, _pick_options(search), setup.options)
    found = own.numbered()
    found |= own.without_families(found)
    if search.measures:
        found |= own.rivals(list(found.values()))
    return [answer.architecture.choices for answer in found.values()]


def pick_as_configured(
    setup: SearchSetup, search: SearchConfig, measure: Measure, distilled: Distilled | None = None, race: Race | None = None
) -> tuple[Architecture, dict[str, Any]]:
    """`pick` with a run's settings."""
    return pick(setup.tables, search.limits, _pick_options(search), setup.options, measure, distilled, race)


def _pick_options(search: SearchConfig) -> PickOptions:
    return PickOptions(
        search.searcher,
        search.candidates,
        search.min_different_layers,
        tuple(name for name in dict.fromkeys(search.rivals) if name != search.searcher),
        search.rivals_from,
        search.without,
        search.local_search_steps,
        search.interaction_blocks,
        *search.second_order,
        search.race_rungs > 0,
        search.race_own,
        search.race_within,
    )


def _distance(candidate: MeasuredAnswer, first: Architecture) -> int:
    return sum(a != b for a, b in zip(candidate.answer.architecture.choices, first.choices, strict=True))


def prediction_error(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float | None]:
    """How far sums of scores were off: the mean of predicted / measured, and the rank correlation (None below 3 candidates).

    Candidates with a measured KL of 0 are left out of the mean, and those whose KL is not finite out of both. Equal values share a rank.
    """
    known = [(p, m) for p, m in zip(predicted, measured, strict=True) if math.isfinite(m)]
    ratios = [p / m for p, m in known if m > 0]
    ranks = [_ranks(values) for values in zip(*known, strict=True)]
    spread = all(np.ptp(of) > 0 for of in ranks)
    return {
        "mean_predicted_over_measured": sum(ratios) / len(ratios) if ratios else None,
        "rank_correlation": float(np.corrcoef(ranks[0], ranks[1]).item(1)) if len(known) > 2 and spread else None,
    }


def _ranks(values: Sequence[float]) -> Floats:
    """Where every value stands among all; of equal ones, each has their mean place."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    middle: Floats = np.cumsum(sizes) - (sizes - 1) / 2
    return middle[group]
