"""The sweep over budgets by Ray Tune. A solve takes milliseconds and a trial half a second, so a trial solves many budgets."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any

from puzzle_ray.errors import ClusterError, PuzzleError
from puzzle_ray.store import Artifact

POINTS_PER_TRIAL = 10  # at least, where there are so many: a trial's process takes as long to start as they take to solve
START_S = 300.0  # at the most until trials run


def solve_points(grid: Any, points: Sequence[Any], artifact: Artifact) -> dict[str, Any]:
    """Solves the points that have no file yet; returns what is in their files now. `grid` is a `puzzle_ray.search.sweep.Grid`."""
    from puzzle_ray.search.sweep import point_name, unsolved_points

    solved: dict[str, Any] = {}
    for point in unsolved_points(points, artifact):
        name = point_name(point)
        solved[name] = grid.solve(point)
        artifact.write_json(name, solved[name])
    return solved


def trial(config: dict[str, Any], grid: Any, artifact: Artifact) -> None:
    """One Tune trial: its share of the points. It reports them too: the driver need not see what another process writes to memory://."""
    from ray import tune

    tune.report({"solved": solve_points(grid, config["points"], artifact)})


def sweep(grid: Any, points: Sequence[Any], artifact: Artifact, num_trials: int) -> None:
    """Runs Tune over the points that have no file in the artifact yet, in up to `num_trials` trials.

    The points' files are all that a sweep leaves; one that was broken off goes on from them. Raises ConfigError or ProfileError where a
    point's numbers are missing, what a trial raised where that is a PuzzleError, ClusterError when a trial fails in another way or when
    trials are not done in the time that their solves may take.
    """
    from puzzle_ray.search.sweep import unsolved_points

    todo = unsolved_points(points, artifact)
    if not todo:
        return
    for point in todo:
        grid.setup(point).tables  # noqa: B018  (what is missing is said here, not by a trial; the trials take the tables along)
    quiet_tune()
    count = min(num_trials, -(-len(todo) // POINTS_PER_TRIAL))
    limit_s = START_S + -(-len(todo) // count) * longest_solve_s(grid)
    with tempfile.TemporaryDirectory(prefix="puzzle-ray-sweep-") as folder:  # of Tune's own state, which nobody needs afterwards
        _fit(_tuner([todo[i::count] for i in range(count)], grid, artifact, limit_s, folder), artifact)
    left = unsolved_points(points, artifact)
    if left:
        problem = f"{len(left)} of {len(points)} points were not solved within {limit_s:.0f} s"
        raise ClusterError("sweep", problem, "see that trials find a free CPU, then run the same command again")


def quiet_tune() -> None:
    """Tune neither writes nor says anything, and leaves interrupts alone."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # an interrupt is the command's, not the experiment's alone
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the old output is silent when told so


def longest_solve_s(grid: Any) -> float:
    """What one point may take: every batch size in turn, twice for searchers that solve a second time to break ties."""
    return max(2 * len(setup.profile.batch_sizes) * setup.time_limit_s for setup in grid.setups.values())


def _tuner(chunks: Sequence[Sequence[Any]], grid: Any, artifact: Artifact, limit_s: float, folder: str) -> Any:
    from ray import tune

    trainable = tune.with_parameters(trial, grid=grid, artifact=artifact)
    return tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space={"points": tune.grid_search([list(chunk) for chunk in chunks])},
        tune_config=tune.TuneConfig(reuse_actors=True, time_budget_s=limit_s),
        run_config=tune.RunConfig(name="sweep", storage_path=folder, verbose=0),
    )


def _fit(tuner: Any, artifact: Artifact) -> None:
    """Runs the trials, and writes the points that only the trial's own process sees. Raises for one that failed, when all are done."""
    results = tuner.fit()
    for result in results:
        for name, solved in ((result.metrics or {}).get("solved") or {}).items():
            if not artifact.exists(name):
                artifact.write_json(name, solved)
    raise_failed(results)


def raise_failed(results: Any) -> None:
    """Raises for the first trial that failed: what it raised itself where that is a PuzzleError, else ClusterError."""
    failed = next((result.error for result in results if result.error is not None), None)
    if failed is None:
        return
    cause = getattr(failed, "cause", failed)
    if isinstance(cause, PuzzleError):
        raise cause
    raise ClusterError("sweep", f"a trial failed: {_last_line(cause)}", "mend that, then run the same command again")


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
