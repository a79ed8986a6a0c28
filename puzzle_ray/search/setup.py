"""What a search reads besides its budget, and the search of one budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from puzzle_ray.artifacts import Architecture, Profile, Scenario, Scores, SearchSpace
from puzzle_ray.errors import ProfileError
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.searcher import Options
from puzzle_ray.search.tables import Tables


@dataclass(frozen=True)
class SearchSetup:
    """What a search reads besides its budget. A sweep replaces `limits`, but keeps their `fixed` and `agree`."""

    space: SearchSpace
    scores: Scores
    profile: Profile
    scenario: Scenario
    metric: str
    searcher: str
    time_limit_s: float
    limits: Limits
    seed: int = 0

    @cached_property
    def tables(self) -> Tables:
        """The numbers, made once for all budgets."""
        return Tables.of(self.space, self.scores, self.profile, self.scenario, self.metric, self.limits)

    @property
    def options(self) -> Options:
        return Options(time_limit_s=self.time_limit_s, seed=self.seed)

    def at_batch_size(self, size: int) -> SearchSetup:
        """The same setup at one batch size only. Raises ProfileError where that size was not profiled."""
        if size not in self.profile.batch_sizes:
            known = ", ".join(map(str, self.profile.batch_sizes))
            raise ProfileError(
                "search.sweep.batch_size", f"{size} was not profiled", f"profiled: {known}; see profile.batch_sizes"
            )
        rows = tuple(row for row in self.profile.rows if row.batch_size == size)
        return replace(self, profile=replace(self.profile, rows=rows), scenario=replace(self.scenario, batch_size=size))


def solve_budget(setup: SearchSetup, limits: Limits) -> Architecture:
    """The best architecture within the limits. Raises Infeasible, or OutOfTime where none was found in time."""
    return setup.tables.search(limits, searcher=setup.searcher, options=setup.options)[0].architecture
