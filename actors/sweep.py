"""The sweep over budgets by Ray Tune. A solve takes milliseconds and a trial half a second, so a trial solves several budgets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from puzzle_ray.store import Step


def solve_points(setup: Any, speedups: Sequence[float], step: Step) -> int:
    """Solves the budgets that have no file yet; returns how many that were. `setup` is a `puzzle_ray.sweep.SweepSetup`."""
    from puzzle_ray.sweep import point_name, solve_point

    todo = [speedup for speedup in speedups if not step.exists(point_name(speedup))]
    for speedup in todo:
        step.write_json(point_name(speedup), solve_point(setup, speedup))
    return len(todo)


def sweep(setup: Any, speedups: Sequence[float], step: Step, num_trials: int) -> None:
    """Runs `num_trials` Tune trials over the budgets that have no file in the step yet. Raises RuntimeError when a trial fails."""
    from ray import tune

    from puzzle_ray.sweep import point_name

    todo = [speedup for speedup in speedups if not step.exists(point_name(speedup))]
    if not todo:
        return
    chunks = [todo[i::num_trials] for i in range(min(num_trials, len(todo)))]

    def trial(config: dict[str, Any]) -> None:
        tune.report({"solved": solve_points(setup, config["speedups"], step)})

    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the old output is silent when told so
    storage = step.path("tune") if step.store.is_local else None
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space={"speedups": tune.grid_search(chunks)},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(name="sweep", storage_path=storage, verbose=0),
    )
    results = tuner.fit()
    for result in results:
        if result.error is not None:
            raise RuntimeError(f"sweep: a trial failed: {result.error}")
