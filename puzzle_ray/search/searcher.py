"""What a searcher is, and which searchers there are.

A searcher gets a `Problem` (numbers only) and returns a `Solution`. It is an object with the members of `Searcher`.
One file in `puzzle_ray/search/searchers` declares it as `SEARCHER`. A searcher elsewhere is named by `package.module:ATTRIBUTE`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from puzzle_ray.errors import ConfigError
from puzzle_ray.plugins import declared, did_you_mean, load_plugin, plugin_source
from puzzle_ray.search.problem import Problem, Solution

SEARCHER, RIVALS = "search.searcher", "search.rivals"  # the settings that name searchers


@dataclass(frozen=True)
class Options:
    """A searcher's settings besides the problem. `samples` is for searchers that draw at random."""

    time_limit_s: float | None = 60.0
    seed: int = 0
    samples: int = 1000


class Searcher(Protocol):
    """One way to choose."""

    name: str

    def solve(self, problem: Problem, options: Options) -> Solution:
        """One choice per row of the problem, within every limit. Raises Infeasible, or OutOfTime where it found none in time."""


@lru_cache(maxsize=1)
def searchers() -> dict[str, Searcher]:
    """Every searcher that has a file in `searchers/`, by its name."""
    all_declared: list[Searcher] = declared("puzzle_ray.search.searchers", "SEARCHER")
    return {searcher.name: searcher for searcher in all_declared}


def searcher_sources(searcher: str, rivals: Iterable[str] = ()) -> dict[str, str]:
    """What identifies those of the searchers that are not of this package, by their source."""
    found: dict[str, str] = {}
    for where, name in ((SEARCHER, searcher), *((RIVALS, rival) for rival in rivals)):
        found |= plugin_source(name, find_searcher(name, where), where=where)
    return found


def find_searcher(name: str, where: str = SEARCHER) -> Searcher:
    """The searcher of that name, or at that dotted path; `where` is the setting that names it. Raises ConfigError."""
    if name in searchers():
        return searchers()[name]
    if ":" not in name:
        raise ConfigError(where, f"unknown searcher {name!r}", did_you_mean(name, searchers()))
    searcher: Searcher = load_plugin(name, where, "searcher")
    if not hasattr(searcher, "solve"):
        raise ConfigError(where, f"{name!r} is no searcher: it lacks solve", "see puzzle_ray.search.searcher.Searcher")
    return searcher
