"""Global distillation on Ray Train: one process per worker, gradients added up over all of them.

Ray Train restarts the whole group when a worker dies; every worker then continues from the last checkpoint, which is the only state
there is. So it does not matter whether a worker, the group, the driver or the cluster is lost. Workers that hold the whole child have
one checkpoint in our own store, which rank 0 writes. Workers that hold a shard each (FSDP) report theirs to Ray Train, which keeps them
in a folder of the artifact: see `actors.gkd_checkpoints`.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from actors.names import actor_name
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.distill.curriculum import gkd_steps
from puzzle_ray.distill.gkd import (
    GkdJob,
    StoredCheckpoint,
    load_gkd_trainer,
    publish_distilled,
    say_epochs,
    steps_saved,
    train_to_end,
)
from puzzle_ray.distill.parallel import looks_sharded, may_shard
from puzzle_ray.errors import ClusterError, PuzzleError
from puzzle_ray.models.checkpoint import first_line
from puzzle_ray.progress import Bar, Progress, Quiet

PING_EVERY_S = 0.2
POLL_EVERY_S = 0.3
STOP_TIMEOUT_S = 20.0
CONTINUE = "the same command continues from the last checkpoint"
STORAGE = ".ray-train"  # Ray Train's folder: its notes of the run, and the checkpoints that were reported to it


class Stopped(PuzzleError):
    """The driver asked the workers to stop."""

    def __str__(self) -> str:
        return f"gkd: stopped; {CONTINUE}"


@dataclass(frozen=True)
class Status:
    """The last news from rank 0; `news` counts them."""

    news: int = 0
    step: int = 0
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Failures:
    """Counts failures from the last step that was saved. `limit`: how many may follow each other; -1 for any number."""

    limit: int
    count: int = 0
    furthest: int = 0

    def add(self, saved: int, reason: str) -> None:
        """One more, while a checkpoint of `saved` steps is there. Raises ClusterError where that is one too many."""
        if saved > self.furthest:
            self.count, self.furthest = 0, saved
        self.count += 1
        if 0 <= self.limit < self.count:
            problem = f"workers failed {self.count} times since {saved} steps were saved; the last time: {reason}"
            raise ClusterError("gkd", problem, "see the workers' logs in Ray's session folder")


class _Pings:
    """Rank 0's progress: tells the run's actor now and then without waiting, and stops when its answer says so."""

    def __init__(self, run: Any) -> None:
        self.run, self.answer, self.sent, self.done = run, None, 0.0, 0
        self._send({})

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Bar]:
        yield self

    def advance(self, count: int = 1, **facts: float) -> None:
        self.done += count
        if time.monotonic() - self.sent >= PING_EVERY_S:
            self._send(facts)

    def _send(self, facts: Mapping[str, float]) -> None:
        if self.answer is not None:
            if not ray.wait([self.answer], timeout=0)[0]:
                return
            if ray.get(self.answer, timeout=POLL_EVERY_S):
                raise Stopped
        self.answer = self.run.note.remote(self.done, dict(facts))
        self.sent = time.monotonic()


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """One worker of the group. `config`: `job`, `run` (the handle of GkdRun), `cpus`."""
    from ray import train
    from ray.train.torch import get_device
    from torch import distributed

    from actors.gkd_checkpoints import ReportedCheckpoints, ReportedProgress
    from puzzle_ray.process import compute_with

    job: GkdJob = config["job"]
    context = train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    progress = _Pings(config["run"]) if rank == 0 else Quiet()
    compute_with(config["cpus"])
    device, add_up = str(get_device()), distributed.all_reduce
    sharded = looks_sharded(job, device, add_up)
    ranks = range(rank, job.config.num_workers, workers)
    trainer = load_gkd_trainer(job, ranks=ranks, all_reduce=add_up, device=device, sharded=sharded)
    stored = StoredCheckpoint(job.artifact, rank == 0)
    kept = ReportedCheckpoints() if sharded else ReportedProgress(stored)
    train_to_end(trainer, job.artifact, progress, checkpoints=kept)
    if sharded or rank == 0:
        publish_distilled(trainer, job, writes=rank == 0)


def _trainer(job: GkdJob, cpus: int, step_timeout_s: float, run: Any) -> Any:
    """The TorchTrainer. Ray Train takes up a run of the same name where it ended, with the checkpoints that it keeps."""
    import fsspec
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    class GiveUp(train.UserCallback):
        """No retry for what would fail again, or fails again and again. What a preempted node takes with it is no failure."""

        failures = Failures(job.config.max_failures)
        reported = 0

        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            self.reported = max(self.reported, int(metrics[0]["step"]))

        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, PuzzleError):
                    raise error
            if not any(map(preempted, worker_exceptions.values())):
                saved = max(self.reported, steps_saved(job.artifact))
                self.failures.add(saved, first_line(next(iter(worker_exceptions.values()))))

    config = job.config
    resources = {"CPU": cpus} | ({"GPU": 1} if config.use_gpu else {})
    storage: dict[str, Any] = {"storage_path": job.artifact.path(STORAGE)}
    if not job.artifact.store.is_local:
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        storage["storage_path"] = fsspec.core.url_to_fs(job.artifact.path(STORAGE))[1]
        storage["storage_filesystem"] = PyFileSystem(FSSpecHandler(job.artifact.store.filesystem))
    backend = "nccl" if config.use_gpu else "gloo"
    workers: Any = config.num_workers
    if config.min_workers is not None and config.min_workers < workers:
        workers = (config.min_workers, workers)
    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"job": job, "run": run, "cpus": cpus},
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if config.cpu_offload else backend, timeout_s=math.ceil(step_timeout_s)
        ),
        scaling_config=train.ScalingConfig(num_workers=workers, use_gpu=config.use_gpu, resources_per_worker=resources),
        run_config=train.RunConfig(
            name=f"gkd-{job.artifact.key}",
            failure_config=train.FailureConfig(max_failures=-1),  # GiveUp counts them: Train would count over the whole run
            checkpoint_config=train.CheckpointConfig(num_to_keep=1),
            callbacks=[GiveUp()],
            **storage,
        ),
    )


def preempted(error: BaseException) -> bool:
    """Whether a worker died with a node that was taken away, as announced."""
    cause = getattr(error, "cause", error)
    return any(isinstance(found, RayActorError) and found.preempted for found in (error, cause))


@ray.remote(num_cpus=0, max_restarts=0, max_concurrency=4)
class GkdRun:
    """Owns one `fit()`, which blocks, and passes news from rank 0 to the driver. The group dies with this actor."""

    def __init__(self) -> None:
        self.last = Status()
        self.stopping = False

    def __repr__(self) -> str:
        return f"GkdRun(step {self.last.step})"

    def fit(self, job: GkdJob, cpus: int, step_timeout_s: float) -> None:
        """Raises the workers' PuzzleError, or Ray Train's TrainingFailedError."""
        from ray.train import ControllerError

        try:
            _trainer(job, cpus, step_timeout_s, ray.get_runtime_context().current_actor).fit()
        except ControllerError as error:
            raise error.controller_failure if isinstance(error.controller_failure, PuzzleError) else error from None

    def note(self, step: int, facts: Mapping[str, float]) -> bool:
        """Rank 0 is at `step`; answers whether it should stop."""
        self.last = Status(self.last.news + 1, step, facts)
        return self.stopping

    def status(self) -> Status:
        return self.last

    def stop(self) -> None:
        self.stopping = True


def equal_share(num_workers: int) -> int:
    """CPUs of a worker: an equal share of the smallest node that has CPUs; workers spread evenly."""
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    nodes = [cpus for cpus in nodes if cpus] or [1]
    return max(1, min(nodes) // math.ceil(num_workers / len(nodes)))


def _environment() -> dict[str, str]:
    """Of the run's actor, inherited by the controller and the workers. What the user has set stays."""
    environment = {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,  # Ray Train's clean-up would look for any cluster here
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # a report waits for the next one; each takes CPU time of every worker
    }
    # Gloo listens on the address the host's name resolves to, which a laptop or container need not have.
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if sum(node["Alive"] for node in ray.nodes()) == 1:
        environment["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = (
            "0"  # one process less: who loses its only node is not there to see it
        )
        if loopback:
            environment["GLOO_SOCKET_IFNAME"] = loopback[0]
    kept = environment.keys() - {"RAY_ADDRESS"}
    return environment | {name: os.environ[name] for name in kept if name in os.environ}


def run_gkd(job: GkdJob, *, cluster: ClusterConfig, progress: Progress, cpus_per_worker: int | None = None) -> None:
    """Distils with `gkd.num_workers` workers, from the job's checkpoint if any; does nothing when it is finished.

    Without `cpus_per_worker` the workers share all CPUs. Raises the workers' own PuzzleError (such as Diverged), or
    ClusterError when they cannot be placed, die more than `gkd.max_failures` times without a checkpoint in between, or fall
    silent for `cluster.step_timeout_s`.
    """
    if job.artifact.finished:
        return
    folder = Path(job.parent).expanduser()
    if folder.is_dir():  # workers have a working directory of their own
        job = replace(job, parent=str(folder.absolute()))
    say_epochs(job)
    if not may_shard(job.config):
        job.artifact.remove(STORAGE)  # what a driver left that was killed: there is nothing to take up
    cpus = cpus_per_worker or equal_share(job.config.num_workers)
    named = actor_name(f"GKD, {job.config.num_workers} workers")
    run = GkdRun.options(runtime_env={"env_vars": _environment()}, **named).remote()  # type: ignore[attr-defined]
    ended = run.fit.remote(job, cpus, cluster.step_timeout_s)
    try:
        _follow(run, ended, job, cluster, progress, cpus)
    except RayTaskError as error:
        raise told(error.cause) from None
    except (RayActorError, GetTimeoutError) as error:
        raise ClusterError("gkd", f"the run's actor is gone ({type(error).__name__})", CONTINUE) from None
    finally:
        _end(run, ended)
        if job.artifact.finished or not may_shard(job.config):
            job.artifact.remove(STORAGE)


def told(cause: Exception) -> PuzzleError:
    """What Ray Train's run was ended by, as the user reads it."""
    if isinstance(cause, PuzzleError):
        return cause
    if isinstance(cause, RayActorError):
        return ClusterError("gkd", "Ray Train's controller died", CONTINUE)
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[-1]
    remedy = CONTINUE if _died(cause) else "see the workers' logs in Ray's session folder"
    return ClusterError("gkd", f"the workers failed ({reason})", remedy)


def _died(error: BaseException) -> bool:
    """Whether workers, nodes or memory failed, and no code, which would fail again."""
    failures = [getattr(failure, "cause", failure) for failure in getattr(error, "worker_failures", {}).values()]
    return bool(failures) and all(isinstance(failure, RayError) for failure in failures)


def _follow(run: Any, ended: Any, job: GkdJob, cluster: ClusterConfig, progress: Progress, cpus: int) -> None:
    """Shows progress until `ended` is ready. Raises ClusterError after too long a silence."""
    config = job.config
    shown, heard, last = steps_saved(job.artifact), time.monotonic(), Status()
    with progress.stage("distill", gkd_steps(config), "steps") as bar:
        bar.advance(shown)  # at once: what an earlier run has done is no speed of this one
        while not ray.wait([ended], timeout=POLL_EVERY_S)[0]:
            now: Status = ray.get(run.status.remote(), timeout=cluster.step_timeout_s)
            if now.news != last.news:
                bar.advance(max(0, now.step - shown), **now.facts)  # steps done again after a restart are not counted
                shown, heard, last = max(shown, now.step), time.monotonic(), now
            silence = time.monotonic() - heard
            if last.news and silence > cluster.step_timeout_s:
                problem = f"no step for {silence:.0f} s after step {last.step}"
                raise ClusterError("gkd", problem, "raise cluster.step_timeout_s")
            if not last.news and silence > cluster.placement_timeout_s:
                each = f"{cpus} CPUs and a GPU" if config.use_gpu else f"{cpus} CPUs"
                problem = f"{config.num_workers} workers with {each} each did not start within {silence:.0f} s"
                raise ClusterError("gkd", problem, "lower gkd.num_workers, or raise cluster.placement_timeout_s")
        ray.get(ended, timeout=cluster.step_timeout_s)
        bar.advance(gkd_steps(config) - shown)


def _end(run: Any, ended: Any) -> None:
    """Lets started workers stop by themselves, so that Ray Train frees what they hold, before the actor is killed."""
    try:
        with suppress(RayError):  # it may be gone already
            if ray.get(run.status.remote(), timeout=STOP_TIMEOUT_S).news:
                run.stop.remote()
                ray.wait([ended], timeout=STOP_TIMEOUT_S)
    finally:
        ray.kill(run)
