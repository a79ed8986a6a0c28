"""The profile: what every variant costs on the target. Of the whole space: what was measured for a run before narrowing counts."""

from __future__ import annotations

import sys
from typing import Any

from jobs.run import Run, Stage
from puzzle_ray.artifacts import Profile, to_json
from puzzle_ray.store import Artifact


def settings(run: Run) -> dict[str, Any]:
    return {"profile": run.profile_config.identity()}


def sources(run: Run) -> dict[str, str]:
    from puzzle_ray.profiling.engine import engine_of, target_of

    profile = run.profile_config
    engine = engine_of(profile)
    space = to_json(run.whole_space).decode()
    return {
        "parent": run.parent.key,
        "space": space,
        "engine": engine.version(),
        "target": target_of(engine, profile, _cpus(run)),
    }


def _cpus(run: Run) -> int:
    """Of the node that will measure. Where Ray is not there yet it will be started on this machine, with all its cores."""
    from puzzle_ray.process import num_cores

    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return num_cores()
    from actors.placement import node_cpus

    return node_cpus(run.profile_config.resources, run.profile_config.label_selector)


def work(run: Run, artifact: Artifact) -> None:
    from actors.profiler import profile_blocks

    profile_blocks(
        run.parent.address, run.whole_space, run.profile_config, run.config.cluster, artifact, run.progress, run.placed
    )


def beside(run: Run) -> bool:
    """Whether the cluster has room for it while the library is trained."""
    from actors.placement import room_beside_profile

    return room_beside_profile(run.profile_config, run.config.cluster)


def said(facts: Any) -> str:
    if facts["estimated"]:
        return f"costs are ESTIMATED by {facts['engine']} for {facts['device']}, not measured"
    return ""


def check_budget(run: Run) -> None:
    """Raises Infeasible where costs are known already and no architecture meets the budget: before blocks are trained for it."""
    from puzzle_ray.search.budget import check_budget

    if run.artifact("profile").finished:
        check_budget(run.space, read(run), run.profile_config.scenario, run.config.search.limits)


def read(run: Run) -> Profile:
    from puzzle_ray.profiling.measure import PROFILE_TABLE

    return Profile.from_parquet(run.content("profile").read(PROFILE_TABLE))


STAGE = Stage("profile", work, reads=("tiny_parent",), settings=settings, sources=sources, said=said, beside=beside)
