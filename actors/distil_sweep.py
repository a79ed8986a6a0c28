"""Children of a sweep, distilled side by side by Ray Tune: a trial is a child, and the hopeless ones end early.

What a child was at a rung, and whether it went on, stands in a file of the sweep's artifact; Tune's own state is nowhere. So a sweep that
was broken off goes on from its rows and the children's checkpoints, with the same decisions.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

from ray.tune import Callback, Stopper
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from actors.placement import not_placed, require
from actors.sweep import quiet_tune, raise_failed
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.distill.gkd import CHILD, GkdJob, say_epochs
from puzzle_ray.distill.race import at_rungs, race
from puzzle_ray.distill.rungs import Climber, RungRow, climb, goes_on, read_rows, to_json, write_rows
from puzzle_ray.errors import ClusterError
from puzzle_ray.progress import Bar, Progress
from puzzle_ray.store import Artifact, adding_items

WHAT = "a child's distillation"
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
    def read(cls, climbers: Sequence[Climber], artifact: Artifact) -> Self:
        rows = cls({climber.name: climber for climber in climbers}, artifact)
        rows.of = read_rows(artifact, rows.climbers)
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
        write_rows(self.artifact, name, own)
        return bool(decided.goes_on)


class RaceRows(Rows):
    """The same of a race, in which everyone waits at a rung for the others: nobody is turned down on arrival."""

    def decided(self, name: str, row: RungRow) -> bool:
        if row.rung > len(self.of[name]):
            self.of[name].append(row)
            write_rows(self.artifact, name, self.of[name])
        return True


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
    config: dict[str, Any],
    climbers: Mapping[str, Climber],
    known: Mapping[str, Sequence[RungRow]],
    rungs: int | Sequence[int],
    cpus: int,
) -> None:
    """One child, from rung to rung, see `climb`; Tune stops it at a report."""
    from ray import tune

    from puzzle_ray.process import compute_with

    climber = climbers[config["child"]]
    compute_with(cpus)
    job = climber.job
    for row in climb(job, rungs, _Says(), device="cuda" if job.config.use_gpu else "cpu", known=known[climber.name]):
        if row in known[climber.name] and not isinstance(rungs, int):
            continue  # a race begins trials anew for every rung
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
    with _leased(climbers, cpus, cluster) as leases:
        rows = Rows.read(climbers, artifact)
        bar = leases.enter_context(progress.stage("distill children", rungs * len(climbers), "rungs"))
        results = _side_by_side(rows, rows.climbers, rungs, cpus, cluster, bar)
    return rows.of, results


def race_children(
    climbers: Sequence[Climber], steps: Sequence[int], artifact: Artifact, *, cpus: int, cluster: ClusterConfig, progress: Progress
) -> dict[str, list[RungRow]]:  # fmt: skip
    """A race (see `puzzle_ray.distill.race`) with rungs after so many steps: those that are at work climb to the next one side by side.

    Returns every child's rows by its name. Raises as `distil_children` does.
    """
    with _leased(climbers, cpus, cluster) as leases:
        rows = RaceRows.read(climbers, artifact)
        total = sum(at_rungs(len(climbers), len(steps)))
        bar = leases.enter_context(progress.stage("race", total, "rungs"))
        bar.advance(sum(map(len, rows.of.values())))

        def advance(names: Sequence[str], number: int) -> None:
            _side_by_side(rows, names, steps[: number + 1], cpus, cluster, bar)

        return race(list(rows.climbers), len(steps), rows.of, advance)


@contextmanager
def _leased(climbers: Sequence[Climber], cpus: int, cluster: ClusterConfig) -> Iterator[ExitStack]:
    """While children are distilled here, nobody else does it. Raises ClusterError where no node has room for one."""
    job = climbers[0].job
    require(_options(job, cpus), WHAT, "gkd.use_gpu", cluster.autoscaling)
    say_epochs(job)
    quiet_tune()
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # between two rungs a trial says nothing of its KL
    with ExitStack() as leases:
        in_order = sorted(climbers, key=lambda climber: climber.name)  # the same in every run: none waits in a circle
        for climber in in_order:
            if not climber.job.artifact.finished:
                leases.enter_context(adding_items(climber.job.artifact))
        yield leases


def _options(job: GkdJob, cpus: int) -> dict[str, int]:
    return {"num_cpus": cpus, "num_gpus": int(job.config.use_gpu)}


def _side_by_side(
    rows: Rows, names: Iterable[str], rungs: int | Sequence[int], cpus: int, cluster: ClusterConfig, bar: Bar
) -> Any:  # fmt: skip
    """Distils these children as trials of Tune, up to `rungs`, and adds their rows."""
    watch = Watch(cluster, bar, rows)
    with tempfile.TemporaryDirectory(prefix="puzzle-ray-sweep-") as folder:
        results = _tuner(rows, list(names), rungs, cpus, watch, folder).fit()
    if rows.failed is not None:
        raise rows.failed
    if watch.silent_s and not watch.started:
        raise not_placed(WHAT, watch.silent_s)
    if watch.silent_s:
        problem = f"no child's distillation said anything for {watch.silent_s:.0f} s"
        raise ClusterError("sweep", problem, "raise cluster.step_timeout_s")
    raise_failed(results)
    return results


def _tuner(rows: Rows, names: list[str], rungs: int | Sequence[int], cpus: int, watch: Watch, folder: str) -> Any:
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback

    known = {name: list(rows.of[name]) for name in names}
    given = tune.with_parameters(trial, climbers=rows.climbers, known=known, rungs=rungs, cpus=cpus)
    job = next(iter(rows.climbers.values())).job
    options = _options(job, cpus)
    resources = {"cpu": options["num_cpus"]} | ({"gpu": options["num_gpus"]} if options["num_gpus"] else {})
    return tune.Tuner(
        tune.with_resources(given, resources),
        param_space={"child": tune.grid_search(names)},
        tune_config=tune.TuneConfig(scheduler=Halving(rows), metric="kl", mode="min", reuse_actors=True),
        run_config=tune.RunConfig(
            name="children",
            storage_path=folder,
            verbose=0,
            stop=watch,
            callbacks=[watch, JsonLoggerCallback()],  # the results' data frames are made of what it writes
            failure_config=tune.FailureConfig(max_failures=job.config.max_failures),
        ),
    )
