"""The last word by measurement: the sum of replace-one scores is a model, and wrong most where whole layers go.

The best different answers of the search, and what simpler searchers answer to the same budget, are measured as whole children;
then blocks are exchanged within the budget while the measured KL falls. How far the model was off is reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from puzzle_ray.artifacts import Architecture, Choices, LayerChoice, Measure, Measured
from puzzle_ray.errors import ConfigError, Infeasible
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.problem import Choice, Floats, Problem
from puzzle_ray.search.searcher import Options
from puzzle_ray.search.tables import Answer, Tables

if TYPE_CHECKING:
    from puzzle_ray.search.settings import SearchConfig
    from puzzle_ray.search.setup import SearchSetup

PICKED = "picked.json"
PROPOSALS = 8  # measured per step of the local search, whatever the number of workers
PAIRED = 800  # single exchanges that are tried in pairs: those that change the score least


@dataclass(frozen=True)
class PickOptions:
    """`count` answers of `searcher`, each `min_different_layers` from the others; one of each rival; then `steps` of local search.

    `interaction_blocks`: of how many much-used blocks all pairs are measured.
    """

    searcher: str = "mip"
    count: int = 1
    min_different_layers: int = 1
    rivals: tuple[str, ...] = ()
    steps: int = 0
    interaction_blocks: int = 0


@dataclass(frozen=True, eq=False)
class MeasuredAnswer:
    """Something that was measured: where it is from, what the scores predicted, what came out."""

    origin: str
    found: Answer
    measured: Measured

    @property
    def rank(self) -> tuple[float, float]:
        return self.measured.kl, self.found.architecture.objective


def pick(
    tables: Tables, limits: Limits, how: PickOptions, options: Options, measure: Measure
) -> tuple[Architecture, dict[str, Any]]:
    """The architecture of least measured KL, and a report of all that was tried (JSON-able). Raises Infeasible."""
    found, origins, left_out = _candidates(tables, limits, how, options)
    measured = measure([f.architecture.choices for f in found])
    candidates = [MeasuredAnswer(*x) for x in zip(origins, found, measured, strict=True)]
    best = min(candidates, key=lambda c: c.rank)
    trail: list[dict[str, Any]] = []
    best = _local_search(tables, best, how.steps, measure, trail)
    first, last = found[0].architecture, best.found.architecture
    same = last.choices == first.choices
    architecture = replace(
        last,
        searcher=how.searcher if same else f"{how.searcher}, measured",
        bound=min(first.bound, last.objective),
        status=first.status if same else "measured",
        solve_s=sum(f.architecture.solve_s for f in found),
    )
    pairs = interactions([c.found.architecture.choices for c in candidates], last.choices, how.interaction_blocks, measure)
    report = {
        "metric": architecture.metric,
        "tokens": best.measured.tokens,
        "picked": _row(best),
        "candidates": [_row(c) | {"layers_unlike_first": _distance(c, first)} for c in candidates],
        "left_out": left_out,
        "local_search": trail,
        "prediction": prediction([c.found.architecture.objective for c in candidates], [c.measured.kl for c in candidates]),
        "interactions": pairs,
    }
    return architecture, report


def _candidates(
    tables: Tables, limits: Limits, how: PickOptions, options: Options
) -> tuple[list[Answer], list[str], dict[str, str]]:
    """What is to be measured, where each is from, and why a rival has none."""
    found = tables.search(
        limits, searcher=how.searcher, count=how.count, min_different_layers=how.min_different_layers, options=options
    )
    origins = [how.searcher if k == 0 else f"{how.searcher} #{k + 1}" for k in range(len(found))]
    left_out: dict[str, str] = {}
    for name in how.rivals:
        try:
            answer = tables.search(limits, searcher=name, options=options)[0]
        except (Infeasible, ConfigError) as error:  # it has no answer: the others do
            left_out[name] = str(error)
            continue
        if all(answer.architecture.choices != other.architecture.choices for other in found):
            found.append(answer)
            origins.append(name)
    return found, origins, left_out


def answers(setup: SearchSetup, search: SearchConfig) -> list[Choices]:
    """What a run's settings search before anything is measured. Raises Infeasible."""
    how = _how(search)
    found, *_ = _candidates(setup.tables, search.limits, how if search.measures else replace(how, rivals=()), setup.options)
    return [answer.architecture.choices for answer in found]


def pick_as_configured(setup: SearchSetup, search: SearchConfig, measure: Measure) -> tuple[Architecture, dict[str, Any]]:
    """`pick` with a run's settings."""
    return pick(setup.tables, search.limits, _how(search), setup.options, measure)


def _how(search: SearchConfig) -> PickOptions:
    return PickOptions(
        search.searcher,
        search.candidates,
        search.min_different_layers,
        search.rivals,
        search.local_search_steps,
        search.interaction_blocks,
    )


def _row(candidate: MeasuredAnswer) -> dict[str, Any]:
    a = candidate.found.architecture
    return {
        "origin": candidate.origin,
        "predicted": a.objective,
        **asdict(candidate.measured),
        "batch_size": a.predicted.batch_size,
        "choices": [choice.label for choice in a.choices],
    }


def _distance(candidate: MeasuredAnswer, first: Architecture) -> int:
    return sum(a != b for a, b in zip(candidate.found.architecture.choices, first.choices, strict=True))


def prediction(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float | None]:
    """How far sums of scores were off: the mean of predicted / measured, and the rank correlation (None below 3 candidates)."""
    pairs = [(p, m) for p, m in zip(predicted, measured, strict=True) if m > 0]
    ratio = sum(p / m for p, m in pairs) / len(pairs) if pairs else None
    ranks = [np.argsort(np.argsort(values)) for values in (predicted, measured)]
    spread = len(set(predicted)) > 1 and len(set(measured)) > 1
    return {
        "mean_predicted_over_measured": ratio,
        "rank_correlation": float(np.corrcoef(ranks[0], ranks[1]).item(1)) if len(predicted) > 2 and spread else None,
    }


# local search


def swaps(problem: Problem, choice: Choice) -> Iterator[Choice]:
    """Choices within the limits that differ in one row or in two, each kind in ascending order of objective, taken in turns."""
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
    """Indices of pairs of single exchanges in different rows that fit together, in ascending order of their damage."""
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
    """Measures the most promising exchanges around the best, moves to the best of them if it is better, and goes on."""
    table, seen = best.found.table, {best.found.architecture.choices}
    for step in range(steps):
        proposals: list[Choice] = []
        for choice in swaps(table.problem, best.found.choice):
            if table.named(choice) not in seen:
                seen.add(table.named(choice))
                proposals.append(choice)
            if len(proposals) == PROPOSALS:
                break
        if not proposals:
            break
        measured = measure([table.named(choice) for choice in proposals])
        found = [_exchanged(tables, best.found, choice) for choice in proposals]
        around = [MeasuredAnswer("local search", f, m) for f, m in zip(found, measured, strict=True)]
        nearest = min(around, key=lambda c: c.rank)
        accepted = nearest.rank < best.rank
        for candidate in around:
            trail.append(
                {
                    "step": step,
                    "exchanges": exchanges(best.found.architecture.choices, candidate.found.architecture.choices),
                    "predicted": candidate.found.architecture.objective,
                    "kl": candidate.measured.kl,
                    "accepted": accepted and candidate is nearest,
                }
            )
        if accepted:
            best = nearest
    return best


def _exchanged(tables: Tables, found: Answer, choice: Choice) -> Answer:
    architecture = replace(
        found.architecture,
        choices=found.table.named(choice),
        objective=found.table.problem.objective(choice),
        predicted=tables.costs(found.table, choice),
    )
    return Answer(architecture, found.table, choice)


def exchanges(before: Choices, after: Choices) -> list[str]:
    """`layer 3: gqa:2 + parent -> noop + parent` for every layer that differs."""
    pairs = enumerate(zip(before, after, strict=True))
    return [f"layer {layer}: {a.label} -> {b.label}" for layer, (a, b) in pairs if a != b]


# interactions


def interactions(candidates: Sequence[Choices], picked: Choices, count: int, measure: Measure) -> list[dict[str, Any]]:
    """For every pair of the blocks that candidates use most, of two layers: the KL with both exchanged, and with each alone.

    `interaction` is the pair's KL less the sum of the two: what a sum of scores cannot know.
    """
    used = Counter(block for choices in (picked, *candidates) for block in enumerate(choices) if block[1] != LayerChoice())
    blocks = sorted((block for block, _ in used.most_common(count)), key=lambda block: (block[0], block[1].label))
    pairs = [(a, b) for a, b in combinations(blocks, 2) if a[0] != b[0]]  # a layer takes one block
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
