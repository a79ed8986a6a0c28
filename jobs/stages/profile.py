"""The profile: what every variant costs on the target. Of the whole space: what was measured for a run before narrowing counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.run import Run, Stage
from puzzle_ray.artifacts import Profile
from puzzle_ray.errors import ClusterError, ProfileError
from puzzle_ray.store import Artifact


def settings(run: Run) -> dict[str, Any]:
    return {"profile": run.profile_config.identity()}


def sources(run: Run) -> dict[str, str]:
    from puzzle_ray.profiling.engine import engine_source
    from puzzle_ray.variants.space import space_sources

    of_space = {"parent": run.parent.key} | space_sources(run.whole_space)
    return of_space | run.target.sources() | engine_source(run.config.profile.engine)


def work(run: Run, artifact: Artifact) -> None:
    from actors.profiler import profile_blocks

    profile_blocks(
        run.parent.address,
        run.whole_space,
        run.profile_config,
        run.config.cluster,
        artifact,
        run.progress,
        run.placed,
        run.target,
    )


def beside(run: Run) -> bool:
    """Whether the cluster has room for it while the library is trained."""
    from actors.placement import room_beside_profile

    return room_beside_profile(run.profile_config, run.config.cluster)


def said(facts: Mapping[str, Any]) -> str:
    from puzzle_ray.profiling.engine import profile_summary

    return profile_summary(facts)


def check_budget(run: Run) -> None:
    """Raises Infeasible where costs are known already and no architecture meets the budget: before blocks are trained for it."""
    from puzzle_ray.search.budget import check_budget
    from puzzle_ray.search.rounds import limits_of_round

    try:
        there = run.artifact("profile").finished
    except (ClusterError, ProfileError):  # no node has the device now: what it costs there is not known, and not needed here
        return
    if there:
        asked, scenario = run.config.search.limits, run.profile_config.scenario
        if run.after:  # the first round looks at what all rounds together are to reach
            asked = limits_of_round(asked, run.number, run.config.rounds, run.space, read(run), scenario)
        check_budget(run.space, read(run), scenario, asked)


def read(run: Run) -> Profile:
    from puzzle_ray.profiling.measure import PROFILE_TABLE

    return Profile.from_parquet(run.content("profile").read(PROFILE_TABLE)).with_details(run.profile_config.memory())


STAGE = Stage("profile", work, reads=("tiny_parent",), settings=settings, sources=sources, said=said, beside=beside)
