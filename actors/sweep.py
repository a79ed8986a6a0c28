"""The sweep over budgets by Ray Tune. A solve takes milliseconds and a trial half a second, so a trial solves many budgets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from puzzle_ray.errors import ClusterError
from puzzle_ray.store import Artifact

FOLDER = "tune"
POINTS_PER_TRIAL = 10  # at least, where there are so many: a trial's process takes as long to start as they take to solve
START_S = 300.0  # at the most until trials run


def solve_points(grid: Any, points: Sequence[Any], artifact: Artifact) -> int:
    """Solves the points that have no file yet; returns how many that were. `grid` is a `puzzle_ray.search.sweep.Grid`."""
    from puzzle_ray.search.sweep import point_name, unsolved_points

    todo = unsolved_points(points, artifact)
    for point in todo:
        artifact.write_json(point_name(point), grid.solve(point))
    return len(todo)


def trial(config: dict[str, Any], grid: Any, artifact: Artifact) -> None:
    """One Tune trial: its share of the points."""
    from ray import tune

    tune.report({"solved": solve_points(grid, config["points"], artifact)})


def sweep(grid: Any, points: Sequence[Any], artifact: Artifact, num_trials: int) -> None:
    """Runs Tune over the points that have no file in the step yet: up to `num_trials` trials, or those of a sweep that was broken off.

    Raises ConfigError or ProfileError where a point's numbers are missing, RuntimeError when a trial fails, ClusterError when trials
    are not done in the time that their solves may take.
    """
    from puzzle_ray.search.sweep import unsolved_points

    todo = unsolved_points(points, artifact)
    if not todo:
        return
    for point in todo:
        grid.setup(point).tables  # noqa: B018  (what is missing is said here, not by a trial; the trials take the tables along)
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the old output is silent when told so
    folder = artifact.path(FOLDER)
    if _can_restore(folder):
        _fit(_restored(folder, grid, artifact))
        todo = unsolved_points(points, artifact)
    if todo:
        count = min(num_trials, -(-len(todo) // POINTS_PER_TRIAL))
        limit_s = START_S + -(-len(todo) // count) * longest_solve_s(grid)
        _fit(_fresh([todo[i::count] for i in range(count)], grid, artifact, limit_s))
        left = unsolved_points(points, artifact)
        if left:
            problem = f"{len(left)} of {len(points)} points were not solved within {limit_s:.0f} s"
            raise ClusterError("sweep", problem, "see that trials find a free CPU, then run the same command again")


def longest_solve_s(grid: Any) -> float:
    """What one point may take: every batch size in turn, twice for searchers that solve a second time to break ties."""
    return max(2 * len(setup.profile.batch_sizes) * setup.time_limit_s for setup in grid.setups.values())


def _can_restore(folder: str) -> bool:
    from ray import tune

    return bool(tune.Tuner.can_restore(folder))


def _trainable(grid: Any, artifact: Artifact) -> Any:
    from ray import tune

    return tune.with_resources(tune.with_parameters(trial, grid=grid, artifact=artifact), {"cpu": 1})


def _restored(folder: str, grid: Any, artifact: Artifact) -> Any:
    from ray import tune

    return tune.Tuner.restore(folder, trainable=_trainable(grid, artifact), resume_unfinished=True, restart_errored=True)


def _fresh(chunks: Sequence[Sequence[Any]], grid: Any, artifact: Artifact, limit_s: float) -> Any:
    from ray import tune

    return tune.Tuner(
        _trainable(grid, artifact),
        param_space={"points": tune.grid_search([list(chunk) for chunk in chunks])},
        tune_config=tune.TuneConfig(reuse_actors=True, time_budget_s=limit_s),
        run_config=tune.RunConfig(name=FOLDER, storage_path=artifact.url, verbose=0),
    )


def _fit(tuner: Any) -> None:
    for result in tuner.fit():
        if result.error is not None:
            raise RuntimeError(f"sweep: a trial failed: {result.error}")
