"""Exchanges of blocks around a measured child, and the local search by the KL of whole children."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np

from puzzle_ray.artifacts import Choices, Measure
from puzzle_ray.search.measured import MeasuredAnswer
from puzzle_ray.search.problem import Choice, Floats, Problem
from puzzle_ray.search.tables import Answer, Tables

LOCAL_SEARCH = "local search"  # who found what it found
PROPOSALS = 8  # children measured per step of the local search, independent of the number of workers
PAIRED = 800  # single exchanges that are combined into pairs: those that change the score least


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


def local_search(
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
