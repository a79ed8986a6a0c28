"""Picks an architecture by measuring whole children.

The sum of replace-one scores only predicts the KL of a whole child. It is most wrong where whole layers are dropped.
So the best distinct answers of the search are measured as whole children, and where the sum was far off, what simpler searchers answer
to the same budget too. Then a local search exchanges blocks within the budget as long as the measured KL falls. Where it is configured,
finalists are distilled for a while, or race on the schedule of the whole distillation, and what is best then is picked.
The report says how far the sums of scores were off.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, islice, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from puzzle_ray.artifacts import Architecture, Choices, LayerChoice, Measure
from puzzle_ray.errors import ConfigError, Infeasible, OutOfTime
from puzzle_ray.search.finalists import (
    LOCAL_SEARCH,
    Distilled,
    MeasuredAnswer,
    Race,
    distilled_best,
    finalists,
    origin_of,
    raced_best,
)
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.problem import Choice, Floats, Problem
from puzzle_ray.search.restricted import without
from puzzle_ray.search.searcher import Options
from puzzle_ray.search.tables import Answer, Tables

if TYPE_CHECKING:
    from puzzle_ray.search.settings import SearchConfig
    from puzzle_ray.search.setup import SearchSetup

PICKED = "picked.json"
PROPOSALS = 8  # children measured per step of the local search, independent of the number of workers
PAIRED = 800  # single exchanges that are combined into pairs: those that change the score least


@dataclass(frozen=True)
class PickOptions:
    """What is measured: `count` answers of `searcher`, one without each family of `without`, one answer of each rival, then `steps` steps
    of local search.

    The answers of `searcher` differ from each other in at least `min_different_layers` layers. Rivals are measured where the least KL
    of these answers is above `rivals_from` times its sum of scores; where the scores are no KLs, always.
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
    found = _own_answers(tables, limits, picking, searching)
    answers = list(found.answers)
    candidates = _measured(found, 0, measure)
    best = min(candidates, key=lambda c: c.rank)
    if reason := _rivals_spared(best, picking):
        found.left_out |= dict.fromkeys(picking.rivals, reason)
    else:
        _add_rivals(found, tables, limits, picking, searching)
        candidates += _measured(found, len(candidates), measure)
        best = min(candidates, key=lambda c: c.rank)
    trail: list[dict[str, Any]] = []
    best = _local_search(tables, best, picking.steps, measure, trail)
    every, count = candidates if best in candidates else [*candidates, best], len(candidates)
    if distilled is not None:
        every, best = distilled_best(every, distilled)
    if race is not None:
        every = [replace(c, also=tuple(found.also.get(c.choices, ()))) for c in every]
        every, best = raced_best(every, finalists(every, picking.searcher, picking.race_own, picking.race_within), race)
    candidates = every[:count]
    first, last = answers[0].architecture, best.answer.architecture
    same = last.choices == first.choices
    architecture = replace(
        last,
        searcher=picking.searcher if same else f"{picking.searcher}, measured",
        bound=min(first.bound, last.objective),
        status=first.status if same else "measured",
        solve_s=sum(answer.architecture.solve_s for answer in answers),
        unsolved_batch_sizes=first.unsolved_batch_sizes,
    )
    pairs = measure_interactions(
        [c.answer.architecture.choices for c in candidates], last.choices, picking.interaction_blocks, measure
    )
    report = {
        "metric": architecture.metric,
        "tokens": best.measured.tokens,
        "picked": best.report_row(),
        "candidates": [c.report_row() | {"layers_unlike_first": _distance(c, first)} for c in candidates],
        "left_out": found.left_out,
        "local_search": trail,
        "prediction": prediction_error(
            [c.answer.architecture.objective for c in candidates], [c.measured.kl for c in candidates]
        ),
        "interactions": pairs,
    }
    report |= {"race": [c.report_row() for c in every if c.rungs]} if race is not None else {}
    return architecture, report


@dataclass
class _Found:
    """Distinct answers and what each is called; who else gave one of them; and the reason for each that there is not."""

    answers: list[Answer] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    also: dict[Choices, list[str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, answer: Answer, origin: str) -> None:
        choices = answer.architecture.choices
        if any(choices == other.architecture.choices for other in self.answers):
            self.also.setdefault(choices, []).append(origin)
        else:
            self.answers.append(answer)
            self.origins.append(origin)


def _measured(found: _Found, first: int, measure: Measure) -> list[MeasuredAnswer]:
    """The answers from number `first` on, as whole children."""
    answers, origins = found.answers[first:], found.origins[first:]
    measured = measure([answer.architecture.choices for answer in answers]) if answers else []
    return [MeasuredAnswer(*x) for x in zip(origins, answers, measured, strict=True)]


def _rivals_spared(best: MeasuredAnswer, picking: PickOptions) -> str:
    """Why rivals are not measured; empty where they are."""
    architecture, kl = best.answer.architecture, best.measured.kl
    if not picking.rivals or architecture.metric != "kl" or not kl <= picking.rivals_from * architecture.objective:  # or NaN
        return ""
    return f"the KL, {kl:.4g}, is not above {picking.rivals_from:g} times its prediction, {architecture.objective:.4g}"


def _own_answers(tables: Tables, limits: Limits, picking: PickOptions, searching: Options) -> _Found:
    """The searcher's answers to measure, and the reason for one that was not found in time."""
    found = _Found()
    try:
        for answer in islice(tables.answers(limits, picking.searcher, picking.min_different_layers, searching), picking.count):
            found.add(answer, origin_of(picking.searcher, len(found.answers) + 1))
    except (Infeasible, OutOfTime) as error:
        if not found.answers:
            raise
        if isinstance(error, OutOfTime):  # else there are no more answers
            found.left_out[origin_of(picking.searcher, len(found.answers) + 1)] = str(error)
    for family in picking.without:
        name = f"{picking.searcher} without {family}"
        try:
            found.add(without(tables, family).search(limits, searcher=picking.searcher, options=searching)[0], name)
        except (Infeasible, OutOfTime, ConfigError) as error:  # the searcher may need that family
            found.left_out[name] = str(error)
    return found


def _add_rivals(found: _Found, tables: Tables, limits: Limits, picking: PickOptions, searching: Options) -> None:
    for name in picking.rivals:
        try:
            found.add(tables.search(limits, searcher=name, options=searching)[0], name)
        except (Infeasible, ConfigError) as error:  # this rival has no answer within the limits; the others are measured
            found.left_out[name] = str(error)


def candidate_choices(setup: SearchSetup, search: SearchConfig) -> list[Choices]:
    """The choices that a run's settings would measure, or take where nothing is measured. Raises Infeasible."""
    picking = _pick_options(search)
    found = _own_answers(setup.tables, search.limits, picking, setup.options)
    if search.measures:
        _add_rivals(found, setup.tables, search.limits, picking, setup.options)
    return [answer.architecture.choices for answer in found.answers]


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
        search.rivals,
        0.0 if search.race_rungs else search.rivals_from,
        search.without,
        search.local_search_steps,
        search.interaction_blocks,
        search.race_own,
        search.race_within,
    )


def measured_kls(report: Mapping[str, Any] | None) -> dict[Choices, float]:
    """The KL of every whole child in the report of a pick, by its choices. Nothing without a report."""
    rows = [*report["candidates"], report["picked"]] if report else []
    return {tuple(LayerChoice(*label.split(" + ")) for label in row["choices"]): row["kl"] for row in rows}


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


def neighbouring_choices(problem: Problem, choice: Choice) -> Iterator[Choice]:
    """Choices within the limits that differ from `choice` in one row or in two.

    Single and double exchanges alternate. Each kind comes in ascending order of objective.
    """
    rows, bounds = problem.rows()
    layers = np.arange(len(choice))
    damage = problem.score - problem.score[layers, choice][:, None]
    change = rows - rows[:, layers, choice][:, :, None]  # [M, R, V]
    slack = bounds - rows[:, layers, choice].sum(axis=1)
    usable = np.isfinite(problem.score)
    usable[layers, choice] = False
    at = np.argwhere(usable)  # [N, 2]
    costs, damages = change[:, at[:, 0], at[:, 1]], damage[at[:, 0], at[:, 1]]
    single = np.flatnonzero((costs <= slack[:, None]).all(axis=0))
    single = single[np.argsort(damages[single], kind="stable")]
    first, second = _pairs(at, costs, damages, slack)
    ones = (at[[i]] for i in single)
    twos = (at[[i, j]] for i, j in zip(first, second, strict=True))
    for moves in zip_longest(ones, twos):
        for move in moves:
            if move is not None:
                other = choice.copy()
                other[move[:, 0]] = move[:, 1]
                if not problem.violated(other):
                    yield other


def _pairs(at: Choice, costs: Floats, damages: Floats, slack: Floats) -> tuple[Choice, Choice]:
    """Pairs of single exchanges in different rows that fit the limits together, as indices into `at`, in ascending order of damage.

    Shapes: N single exchanges, M limits. `at` [N, 2] is (row, choice), `costs` [M, N] and `damages` [N] are changes, `slack` [M].
    """
    near = np.sort(np.argsort(np.abs(damages), kind="stable")[:PAIRED])
    i, j = np.triu_indices(len(near), 1)
    i, j = near[i], near[j]
    fits = at[i, 0] != at[j, 0]
    for cost, room in zip(costs, slack, strict=True):
        fits &= cost[i] + cost[j] <= room
    i, j = i[fits], j[fits]
    order = np.argsort(damages[i] + damages[j], kind="stable")
    return i[order], j[order]


def _local_search(
    tables: Tables, best: MeasuredAnswer, steps: int, measure: Measure, trail: list[dict[str, Any]]
) -> MeasuredAnswer:
    """Measures the most promising exchanges around the best child, and moves to the best of them where that is better.

    It stops after `steps` steps, or where no exchange is left. Every measured exchange is added to `trail`.
    """
    table, seen = best.answer.table, {best.answer.architecture.choices}
    for step in range(steps):
        proposals: list[Choice] = []
        for choice in neighbouring_choices(table.problem, best.answer.choice):
            if table.named(choice) not in seen:
                seen.add(table.named(choice))
                proposals.append(choice)
            if len(proposals) == PROPOSALS:
                break
        if not proposals:
            break
        measured = measure([table.named(choice) for choice in proposals])
        answers = [_exchanged(tables, best.answer, choice) for choice in proposals]
        around = [MeasuredAnswer(LOCAL_SEARCH, answer, m) for answer, m in zip(answers, measured, strict=True)]
        best_around = min(around, key=lambda c: c.rank)
        accepted = best_around.rank < best.rank
        for candidate in around:
            trail.append(
                {
                    "step": step,
                    "exchanges": describe_exchanges(best.answer.architecture.choices, candidate.answer.architecture.choices),
                    "predicted": candidate.answer.architecture.objective,
                    "kl": candidate.measured.kl,
                    "accepted": accepted and candidate is best_around,
                }
            )
        if accepted:
            best = best_around
    return best


def _exchanged(tables: Tables, answer: Answer, choice: Choice) -> Answer:
    """The answer with another choice of the same table."""
    architecture = replace(
        answer.architecture,
        choices=answer.table.named(choice),
        objective=answer.table.problem.objective(choice),
        predicted=tables.costs(answer.table, choice),
    )
    return Answer(architecture, answer.table, choice)


def describe_exchanges(before: Choices, after: Choices) -> list[str]:
    """`layer 3: gqa:2 + parent -> noop + parent` for every layer that differs."""
    pairs = enumerate(zip(before, after, strict=True))
    return [f"layer {layer}: {a.label} -> {b.label}" for layer, (a, b) in pairs if a != b]


def measure_interactions(candidates: Sequence[Choices], picked: Choices, count: int, measure: Measure) -> list[dict[str, Any]]:
    """Measures how damages of two layers add up, for all pairs of the `count` blocks that candidates use most.

    For every pair: the KL with both blocks replaced, and with each alone. `interaction` is the pair's KL less the sum of the two
    single KLs. A sum of replace-one scores assumes that it is 0.
    """
    used = Counter(block for choices in (picked, *candidates) for block in enumerate(choices) if block[1] != LayerChoice())
    blocks = sorted((block for block, _ in used.most_common(count)), key=lambda block: (block[0], block[1].label))
    pairs = [(a, b) for a, b in combinations(blocks, 2) if a[0] != b[0]]  # a layer holds only one block
    if not pairs:
        return []
    whole: list[Mapping[int, LayerChoice]] = [*(dict([block]) for block in blocks), *(dict(pair) for pair in pairs)]
    measured = measure([tuple(x.get(layer, LayerChoice()) for layer in range(len(picked))) for x in whole])
    alone = {block: m.kl for block, m in zip(blocks, measured, strict=False)}
    return [
        {
            "a": f"layer {a[0]}: {a[1].label}",
            "b": f"layer {b[0]}: {b[1].label}",
            "kl_a": alone[a],
            "kl_b": alone[b],
            "kl_both": both.kl,
            "interaction": both.kl - alone[a] - alone[b],
        }
        for (a, b), both in zip(pairs, measured[len(blocks) :], strict=True)
    ]
