"""The architecture for one budget: searched, with exact scores in place of estimates, and picked by measurement where configured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from puzzle_ray.artifacts import Architecture, LayerChoice, Measure, Scores, to_json
from puzzle_ray.search.finalists import Distilled, Race
from puzzle_ray.search.pick import PICKED, candidate_choices, pick_as_configured
from puzzle_ray.search.settings import SearchConfig
from puzzle_ray.search.setup import SearchSetup, solve_budget
from puzzle_ray.store import Artifact

ARCHITECTURE = "architecture.json"
SCORES = "scores.parquet"

Answers = Callable[[Scores], Iterable[Sequence[LayerChoice]]]  # the choices that a search with these scores finds
MakeExact = Callable[[Scores, Answers], Scores]  # scores with exact values for everything that the answers use


@dataclass(frozen=True)
class Chosen:
    """An architecture, the scores it was searched by, and the report of measurements (None where nothing was measured)."""

    architecture: Architecture
    scores: Scores
    report: dict[str, Any] | None = None


def choose(
    setup: SearchSetup,
    search: SearchConfig,
    make_exact: MakeExact | None,
    measuring: Callable[[], AbstractContextManager[Measure]],
    distilled: Distilled | None = None,
    race: Race | None = None,
) -> Chosen:
    """The best architecture within `search.limits`.

    `make_exact` is None where every score is exact already. `measuring` opens a function that measures whole children. It is used only
    where `search.measures`, `distilled` where `search.distil_tokens` configures it, and `race` where `search.race_rungs` does. Raises
    Infeasible where no architecture meets the limits, and OutOfTime where none was found in time.
    """
    scores = setup.scores
    if make_exact is not None:
        scores = make_exact(scores, lambda seen: candidate_choices(replace(setup, scores=seen), search))
        setup = replace(setup, scores=scores)
    if not search.measures:
        return Chosen(solve_budget(setup, search.limits), scores)
    with measuring() as measure:
        before_pick = distilled if search.distil_tokens else None, race if search.race_rungs else None
        architecture, report = pick_as_configured(setup, search, measure, *before_pick)
    if make_exact is not None:  # local search may have chosen blocks whose scores are still estimates
        scores = make_exact(scores, lambda _: [architecture.choices])
        total = math.fsum(scores.value(i, c, architecture.metric) for i, c in enumerate(architecture.choices))
        architecture = replace(architecture, objective=total, bound=min(architecture.bound, total))
    return Chosen(architecture, scores, report)


def save_choice(chosen: Chosen, artifact: Artifact) -> None:
    """Writes the architecture, its scores and the report of measurements, and finishes the artifact."""
    if chosen.report is not None:
        artifact.write_json(PICKED, chosen.report)
    architecture = chosen.architecture
    artifact.write(SCORES, chosen.scores.to_parquet())
    artifact.write(ARCHITECTURE, to_json(architecture))
    artifact.finish({"objective": architecture.objective, "bound": architecture.bound, "status": architecture.status})
