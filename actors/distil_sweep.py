"""Children of a sweep, distilled side by side by Ray Tune: a trial is a child, and the hopeless ones end early.

What a child was at a rung, and whether it went on, stands in a file of the sweep's artifact; Tune's own state is nowhere. So a sweep that
was broken off goes on from its rows and the children's checkpoints, with the same decisions.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from actors.placement import not_placed, require
from actors.sweep import quiet_tune, raise_failed
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.distill.gkd import CHILD, say_epochs
from puzzle_ray.distill.rungs import Climber, RungRow, climb, from_json, goes_on, to_json
from puzzle_ray.errors import ClusterError
from puzzle_ray.progress import Bar, Progress
from puzzle_ray.store import Artifact, adding_items

WHAT = "a child's distillation"
ROWS = "rungs"  # a folder of the sweep's artifact
SAYS_EVERY_S = 5.0


@dataclass
class Rows:
    """Children's rows, kept in an artifact: whoever was at a rung, in the order in which they came."""

    climbers: Mapping[str, Climber]
    artifact: Artifact
    of: dict[str, list[RungRow]] = field(default_factory=dict)
    came: dict[int, list[str]] = field(default_factory=dict)
    failed: Exception | None = None  # a row could not be written

    @classmethod
    def read(cls, climbers: Sequence[Climber], artifact: Artifact) -> Rows:
        rows = cls({climber.name: climber for climber in climbers}, artifact)
        there, known = set(artifact.names(ROWS)), {}
        for name in rows.climbers:
            if f"{name}.json" in there:
                known[name] = artifact.read_json(f"{ROWS}/{name}.json")
        rows.of = {name: [from_json(row) for row in known[name]] if name in known else [] for name in rows.climbers}
        for name, own in rows.of.items():
            for row in own:
                rows.came.setdefault(row.rung, []).append(name)
        return rows

    def decided(self, name: str, row: RungRow) -> bool:
        """Whether a child goes on from a rung; written down where it is new."""
        own = self.of[name]
        if row.rung <= len(own):  # told again, by a trial that was started again or of an earlier run
            return bool(own[row.rung - 1].goes_on)
        before = [(self.climbers[other], self.of[other][row.rung - 1].kl) for other in self.came.get(row.rung, [])]
        decided = replace(row, goes_on=row.is_last or goes_on(self.climbers[name], row.kl, before))
        own.append(decided)
        self.came.setdefault(row.rung, []).append(name)
        self.artifact.write_json(f"{ROWS}/{name}.json", [to_json(each) for each in own])
        return bool(decided.goes_on)


class Halving(FIFOScheduler):
    """Ends the trials of children that do not go on from a rung."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    @property
    def supports_buffered_results(self) -> bool:
        return False

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        if "rung" not in result:
            return str(TrialScheduler.CONTINUE)
        row = RungRow(result["rung"], result["step"], result["tokens"], result["kl"], is_last=result["is_last"])
        try:
            going = self.rows.decided(trial.config["child"], row)
        except Exception as error:  # Tune would make a traceback's text of it
            self.rows.failed, going = error, False
        return str(TrialScheduler.CONTINUE if going else TrialScheduler.STOP)


class Watch(Callback, Stopper):
    """Shows how far the trials are. Ends them all where none starts, or says anything, for too long, or where `rows` failed."""

    def __init__(self, cluster: ClusterConfig, bar: Bar, rows: Rows) -> None:
        self.limits, self.bar, self.rows = (cluster.placement_timeout_s, cluster.step_timeout_s), bar, rows
        self.heard, self.started, self.silent_s = time.monotonic(), False, 0.0

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.heard, self.started = time.monotonic(), True

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        self.heard = time.monotonic()
        if "rung" in result:
            self.bar.advance(kl=result["kl"])

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        silence = time.monotonic() - self.heard
        if silence > self.limits[self.started]:
            self.silent_s = silence
        return bool(self.silent_s) or self.rows.failed is not None

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a copy of it beside its state; the bar stays here."""
        return {name: value for name, value in vars(self).items() if name != "bar"}


class _Says:
    """A trial's progress: a report without a rung now and then, so that the driver hears of it."""

    def __init__(self) -> None:
        self.said = 0.0

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Bar]:
        self.advance()
        yield self

    def advance(self, count: int = 1, **facts: float) -> None:
        from ray import tune

        if time.monotonic() - self.said > SAYS_EVERY_S:
            self.said = time.monotonic()
            tune.report({f"train_{name}": value for name, value in facts.items()} or {"begun": True})


def trial(
    config: dict[str, Any], climbers: Mapping[str, Climber], known: Mapping[str, Sequence[RungRow]], rungs: int, cpus: int
) -> None:
    """One child, from rung to rung; Tune stops it at a report."""
    from ray import tune

    from puzzle_ray.process import compute_with

    climber = climbers[config["child"]]
    compute_with(cpus)
    job = climber.job
    for row in climb(job, rungs, _Says(), device="cuda" if job.config.use_gpu else "cpu", known=known[climber.name]):
        done = {"child_folder": job.artifact.path(CHILD)} if job.artifact.finished else {}
        own = {name: value for name, value in to_json(row).items() if name != "goes_on"}
        tune.report({"budget": climber.label, **climber.facts, **own, **done})


def distil_children(
    climbers: Sequence[Climber], rungs: int, artifact: Artifact, *, cpus: int, cluster: ClusterConfig, progress: Progress
) -> tuple[dict[str, list[RungRow]], Any]:
    """Distils children, each in one process with `cpus` CPUs, and a GPU where `gkd.use_gpu` says so.

    Returns every child's rows by its name, and Tune's ResultGrid: a result per child, whose metrics are the last rung's `kl`, `tokens`,
    `step` and `rung`, what `Climber.facts` holds, `budget`, and `child_folder` where it was distilled to the end. Raises what a trial
    raised where that is a PuzzleError, and ClusterError where one fails in another way, none can be placed, or all fall silent.
    """
    options = {"num_cpus": cpus, "num_gpus": int(climbers[0].job.config.use_gpu)}
    require(options, WHAT, "gkd.use_gpu", cluster.autoscaling)
    say_epochs(climbers[0].job)
    quiet_tune()
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # between two rungs a trial says nothing of its KL
    with ExitStack() as leases:
        for climber in sorted(
            climbers, key=lambda climber: climber.name
        ):  # in the same order in every run: none waits in a circle
            if not climber.job.artifact.finished:
                leases.enter_context(adding_items(climber.job.artifact))
        rows = Rows.read(climbers, artifact)
        bar = leases.enter_context(progress.stage("distill children", rungs * len(climbers), "rungs"))
        watch = Watch(cluster, bar, rows)
        with tempfile.TemporaryDirectory(prefix="puzzle-ray-sweep-") as folder:
            results = _tuner(rows, rungs, options, watch, folder).fit()
        if rows.failed is not None:
            raise rows.failed
        if watch.silent_s and not watch.started:
            raise not_placed(WHAT, watch.silent_s)
        if watch.silent_s:
            problem = f"no child's distillation said anything for {watch.silent_s:.0f} s"
            raise ClusterError("sweep", problem, "raise cluster.step_timeout_s")
        raise_failed(results)
    return rows.of, results


def _tuner(rows: Rows, rungs: int, options: Mapping[str, int], watch: Watch, folder: str) -> Any:
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback

    known = {name: list(own) for name, own in rows.of.items()}
    given = tune.with_parameters(trial, climbers=rows.climbers, known=known, rungs=rungs, cpus=options["num_cpus"])
    resources = {"cpu": options["num_cpus"]} | ({"gpu": options["num_gpus"]} if options["num_gpus"] else {})
    failures = next(iter(rows.climbers.values())).job.config.max_failures
    return tune.Tuner(
        tune.with_resources(given, resources),
        param_space={"child": tune.grid_search(list(rows.climbers))},
        tune_config=tune.TuneConfig(scheduler=Halving(rows), metric="kl", mode="min", reuse_actors=True),
        run_config=tune.RunConfig(
            name="children",
            storage_path=folder,
            verbose=0,
            stop=watch,
            callbacks=[watch, JsonLoggerCallback()],  # the results' data frames are made of what it writes
            failure_config=tune.FailureConfig(max_failures=failures),
        ),
    )
