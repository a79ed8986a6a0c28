"""What a run does, told while it runs: to its log, to Ray's metrics, to TensorBoard, and as a page that is written after every stage.

None of it decides anything: where one of them fails, that is said, and the run goes on.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jobs.curves import Curves
from jobs.endings import SUBMITTED
from jobs.run import OF_ORIGINAL, Run
from puzzle_ray.config import RunConfig
from puzzle_ray.progress import RESUMED_WITHIN_S, Bar
from puzzle_ray.run_log import RunLog, new_run_id
from puzzle_ray.store import Artifact
from puzzle_ray.version import __version__

LOOK_EVERY_S = 10.0  # at the cluster
QUIET_S = 18.0  # without progress, before a log is told that the run is at work: a line every half minute at the least
TELL_EVERY_S = 2.0  # how a stage gets on
LEAVE_S = 1.5  # that what is being told is waited for; a submitted job has two seconds to end
PAGE = "index.html"  # beside the log


def tokens_per_unit(config: RunConfig) -> Mapping[str, int]:
    """Training tokens behind one unit of a stage's progress; of a distillation in stages, those of its mean step."""
    gkd, workers = config.gkd, config.gkd.num_workers * config.gkd.gradient_accumulation
    steps = sum(stage.tokens / (stage.micro_batch_tokens * workers) for stage in gkd.stages)
    a_step = round(gkd.total_tokens / steps) if steps else gkd.micro_batch_tokens * workers
    return {"library": config.library.micro_batch_tokens, "distill": a_step}


@contextmanager
def observed(run: Run, verb: str) -> Iterator[Observer]:
    """Within the block everything that the run does is told."""
    observer = Observer(run, verb)
    how, error = "finished", ""
    try:
        yield observer
    except BaseException as failure:
        how = "failed" if isinstance(failure, Exception) else "interrupted"
        error = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        raise
    finally:
        observer.close(how, error if how == "failed" else "")


class Observer:
    """Listens to one run: its progress, its stages, and the cluster that it has."""

    def __init__(self, run: Run, verb: str) -> None:
        self.run = run
        self.log = RunLog(run.store, new_run_id())
        self.curves = Curves(self.log)
        self.tokens = tokens_per_unit(run.config)
        self.stages_done: set[str] = set()  # stages whose results are there
        self.stage_of_thread: dict[int, list[str]] = {}  # the stages that a thread is in, the innermost last
        self.failed: set[str] = set()  # what cannot be told, and was said once
        self.bars: list[_ToldBar] = []  # open ones
        self.moved = self.said = time.monotonic()  # when there was progress last; when something was said about that
        self.closing = threading.Event()
        self.on_cluster = threading.Lock()  # Ray is asked under it, and never again once it is closing
        self.first, self.inner = run, run.progress
        run.progress, run.listener = self, self
        job = os.environ.get("RAY_JOB_ID") if SUBMITTED in os.environ else None
        who = {"verb": verb, "host": socket.gethostname(), "pid": os.getpid(), "version": __version__, "job": job}
        self.log.event("run_begun", **who, config=run.config.model_dump(mode="json"))
        if run.decided:
            self.log.event("hardware", decided=run.decided)
        self._with_metrics(lambda metrics: metrics.of_run(self.log.run_id))
        print(f"  run {self.log.run_id}: puzzle-ray watch --store {run.config.store}", file=sys.stderr, flush=True)
        self.thread = threading.Thread(target=self._watch, name="observer", daemon=True)
        self.thread.start()
        threading.Thread(target=self._reassure, name="at work", daemon=True).start()  # its own: a cluster may be slow to answer

    # the run's progress

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Bar]:
        """A bar that is drawn as ever, and told."""
        stage = (self.stage_of_thread.get(threading.get_ident()) or [name])[-1]
        with self.inner.stage(name, total, unit) as bar:
            told = _ToldBar(self, bar, stage, name, total, unit)
            self.bars.append(told)
            self.heard()
            try:
                yield told
            finally:
                self.bars.remove(told)
                told.tell()
                self.log.event("bar_closed", stage=stage, bar=name)

    # the run's stages

    def heard(self) -> None:
        """There is progress."""
        self.moved = self.said = time.monotonic()

    def say_at_work(self) -> None:
        """One line where a log has read nothing of this run for `QUIET_S`; on a terminal the bars are there to be seen."""
        now = time.monotonic()
        if sys.stderr.isatty() or now - self.said < QUIET_S:
            return
        self.said = now
        open_bars = [f"{bar.name} {bar.done}/{bar.total} {bar.unit}" for bar in list(self.bars)]
        stages = {inside[-1] for inside in list(self.stage_of_thread.values()) if inside} - {bar.stage for bar in list(self.bars)}
        what = ", ".join([*open_bars, *sorted(stages)]) or "between stages"
        print(f"  still at work: {what}; no progress for {now - self.moved:.0f} s", file=sys.stderr, flush=True)

    def begun(self, artifact: Artifact) -> None:
        self.heard()
        self.stage_of_thread.setdefault(threading.get_ident(), []).append(artifact.stage)
        self.log.event("stage_begun", stage=artifact.stage, artifact=artifact.name)

    def ended(self, artifact: Artifact, did: bool, seconds: float) -> None:
        self.heard()
        inside = self.stage_of_thread.get(threading.get_ident(), [])
        if inside and inside[-1] == artifact.stage:
            inside.pop()
        record = artifact.record()
        size = sum(entry.bytes for entry in record.files.values()) if record else 0
        facts = dict(record.facts) if record else {}
        self.log.event(
            "stage_finished",
            stage=artifact.stage,
            artifact=artifact.name,
            did=did,
            seconds=round(seconds, 3),
            bytes=size,
            facts=facts,
        )
        self._with_metrics(lambda metrics: metrics.note("artifact_bytes", size, stage=artifact.stage))
        if did:
            self._guarded("TensorBoard's curves", lambda: self._draw(artifact))

    def follow(self, run: Run) -> None:
        """A round begins: the page is about it now, and about what all rounds share."""
        self.run, self.stages_done = run, self.stages_done & {*OF_ORIGINAL}
        self.log.event("round_begun", round=run.number, rounds=run.config.rounds)

    def done(self, name: str) -> None:
        self.stages_done.add(name)
        self._guarded("the page", self._write_page)

    def _draw(self, artifact: Artifact) -> None:
        if artifact.stage == "library":
            self.curves.add_library(artifact)
        elif artifact.stage == "gkd":
            self.curves.add_gkd(artifact)

    def _write_page(self) -> None:
        from jobs.stages.report import so_far
        from puzzle_ray.report.page import render

        found = so_far(self.run, self.stages_done)
        if found is not None:
            self.log.write_file(PAGE, render(found).encode())

    def close(self, how: str, error: str) -> None:
        """Nothing is told after this, and Ray is not asked any more."""
        self.closing.set()
        self.thread.join(LEAVE_S)
        self._guarded("TensorBoard's curves", self.curves.close)
        self.log.event("run_ended", how=how, error=error)
        self.log.flush()
        self.first.progress, self.first.listener = self.inner, None

    def _reassure(self) -> None:
        while not self.closing.wait(LOOK_EVERY_S):
            self.say_at_work()

    # the cluster

    def _watch(self) -> None:
        while not self.closing.wait(LOOK_EVERY_S):
            self._guarded("what the cluster does", self._tell_cluster)
            self._guarded("TensorBoard's curves", self.curves.flush)
            self.log.flush()

    def _tell_cluster(self) -> None:
        ray = sys.modules.get("ray")
        with self.on_cluster:
            if self.closing.is_set() or ray is None or not ray.is_initialized():
                return
            from actors.cluster_view import cluster_view

            view = cluster_view()
        self.log.event("cluster", **view)

    def _with_metrics(self, tell: Any) -> None:
        if "ray" in sys.modules:
            from actors import metrics

            self._guarded("Ray's metrics", lambda: tell(metrics))

    def _guarded(self, what: str, tell: Any) -> None:
        try:
            tell()
        except Exception as error:
            if what not in self.failed:
                self.failed.add(what)
                reason = (str(error).strip() or "no reason given").splitlines()[0]
                print(f"  {what} cannot be told ({type(error).__name__}: {reason})", file=sys.stderr, flush=True)


class _ToldBar:
    """Passes on, counts, and tells now and then."""

    def __init__(self, observer: Observer, bar: Bar, stage: str, name: str, total: int, unit: str) -> None:
        self.observer, self.bar = observer, bar
        self.stage, self.name, self.total, self.unit = stage, name, total, unit
        self.done, self.told = 0, time.monotonic()
        self.opened = self.told
        self.before = (self.told, 0)  # when it was told last, and how much was done by then
        self.facts: dict[str, float] = {}

    def advance(self, count: int = 1, **facts: float) -> None:
        self.bar.advance(count, **facts)
        self.observer.heard()
        self.done += count
        if time.monotonic() - self.opened < RESUMED_WITHIN_S:  # done in an earlier run: no speed of this one
            self.before = (self.opened, self.done)
        if facts:
            self.facts.update(facts)
            observer, step = self.observer, self.done
            observer._guarded("TensorBoard's curves", lambda: observer.curves.add(self.name, step, facts))
        if time.monotonic() - self.told >= TELL_EVERY_S:
            self.tell()

    def tell(self) -> None:
        """To the log and the metrics."""
        now = self.told = time.monotonic()
        then, done = self.before
        rate = max(0.0, (self.done - done) / (now - then)) if now > then else 0.0
        self.before = (now, self.done)
        tokens = self.observer.tokens.get(self.name)
        told = {"done": self.done, "total": self.total, "unit": self.unit, "per_s": round(rate, 4)}
        told |= {"tokens_per_s": round(rate * tokens, 1)} if tokens else {}
        self.observer.log.event("progress", stage=self.stage, bar=self.name, **told, facts=self.facts)

        def to_ray(metrics: Any) -> None:
            metrics.note("items_done", self.done, stage=self.name, unit=self.unit)
            metrics.note("items_left", self.total - self.done, stage=self.name, unit=self.unit)
            metrics.note("items_per_s", rate, stage=self.name, unit=self.unit)
            if tokens:
                metrics.note("tokens_per_s", rate * tokens, stage=self.name)
            if "loss" in self.facts:
                metrics.note("loss", self.facts["loss"], stage=self.name)

        self.observer._with_metrics(to_ray)
