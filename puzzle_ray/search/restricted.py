"""Searches that leave out some variants of the space."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.search.tables import Table, Tables


def without(tables: Tables, family: str) -> Tables:
    """The tables without choices that have a variant of this family, such as `gqa`."""

    def has_it(choice: LayerChoice) -> bool:
        return any(family == name.partition(":")[0] for name in (choice.attention, choice.ffn))

    def masked(table: Table) -> Table:
        score = table.problem.score.copy()
        for row, choices in enumerate(table.choices):
            score[row, [v for v, choice in enumerate(choices) if has_it(choice)]] = np.inf
        return replace(table, problem=replace(table.problem, score=score))

    return replace(tables, tables=tuple(map(masked, tables.tables)))
