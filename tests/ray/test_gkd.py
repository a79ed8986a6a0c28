"""Global distillation on Ray Train: whatever is killed, the child ends in the bits of an undisturbed serial run.

Its learning rate is chosen by a range test, it is watched on held-out text, and the average of its weights is what is published.
"""

import dataclasses
import math
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from gkd_jobs import gkd_jobs
from pickles import pickles_in
from ray.exceptions import ActorDiedError, RayActorError

from actors.gkd import STORAGE, Failures, preempted, run_gkd, told
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.distill.gkd import CHILD, CURVE, LOOKS, distill_child, steps_saved
from puzzle_ray.distill.gkd_trainer import Diverged, GkdRow
from puzzle_ray.distill.settings import GkdConfig
from puzzle_ray.distill.sharded_checkpoint import RUN
from puzzle_ray.errors import ClusterError
from puzzle_ray.models.child import load_model
from puzzle_ray.progress import Quiet
from puzzle_ray.rows import rows_from_parquet

STEPS = 140
CONFIG = GkdConfig(
    tokens=STEPS * 64,
    micro_batch_tokens=32,
    num_workers=2,
    learning_rate="auto",
    checkpoint_every=20,
    max_failures=1,
    average_weights=True,
)
CLUSTER = ClusterConfig()


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Of text whose documents, which begin with token 5, do not see each other."""
    return dataclasses.replace(gkd_jobs(tmp_path_factory.mktemp("gkd"), CONFIG)[0], separator=5)


@pytest.fixture(scope="module")
def serial(job):
    """The files an undisturbed run in one process leaves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    distill_child(job, Quiet())
    torch.set_num_threads(threads)
    return published(job.artifact)


def published(step):
    assert step.finished and step.names() == ["artifact.json", CHILD, LOOKS, CURVE] and step.facts()["range_test"]
    return load_model(step.local_folder(CHILD)).state_dict(), step.read(CURVE) + step.read(LOOKS), step.facts()


def assert_same(run, expected):
    (weights, curve, facts), (expected_weights, expected_curve, expected_facts) = run, expected
    assert weights.keys() == expected_weights.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected_weights[name])] == []
    assert curve == expected_curve and facts == expected_facts


def another(job, name, **changes):
    return dataclasses.replace(
        job, artifact=job.artifact.store.artifact("gkd", {"test": name}, {}), config=job.config.model_copy(update=changes)
    )


class Midway:
    """Progress that does something as soon as there is a checkpoint, and again whenever there is a later one.

    It waits for a step of this run, for before the first one there are no workers to disturb.
    """

    def __init__(self, step, action, times=1):
        self.artifact, self.action, self.times, self.steps_shown, self.acted_at = step, action, times, 0, []

    @contextmanager
    def stage(self, name, total, unit):
        assert total == STEPS
        yield self

    def advance(self, count=1, **facts):
        self.steps_shown += count
        saved = steps_saved(self.artifact)
        if facts and len(self.acted_at) < self.times and saved > max(self.acted_at, default=0):
            self.acted_at.append(saved)
            self.action()


def command(process):
    """Of a process that may be ending: then it is empty."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill_a_worker():
    workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in command(p)]
    assert len(workers) == 2
    workers[1].kill()


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("kills", [1, pytest.param(2, marks=pytest.mark.wide)])
def test_an_interrupted_driver_and_a_killed_worker_change_nothing(local_ray, job, serial, monkeypatch, kills):
    """Interrupted once there is a checkpoint; the run that goes on from there loses a worker, and after the next checkpoint another.

    One failure is allowed between two checkpoints. The parent is a relative path here.
    """
    mine = dataclasses.replace(another(job, f"interrupted, then killed {kills} times"), parent="parent")
    monkeypatch.chdir(Path(job.parent).parent)
    progress = Midway(mine.artifact, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_gkd(mine, cluster=CLUSTER, progress=progress, cpus_per_worker=1)
    assert progress.acted_at and steps_saved(mine.artifact) < STEPS and not mine.artifact.finished
    progress = Midway(mine.artifact, kill_a_worker, times=kills)
    run_gkd(mine, cluster=CLUSTER, progress=progress, cpus_per_worker=1)
    assert len(progress.acted_at) == kills and progress.acted_at[-1] < STEPS and progress.steps_shown == STEPS
    assert_same(published(mine.artifact), serial)


class Reported(Midway):
    """Progress that does something whenever Ray Train has another checkpoint of the workers' shards, one action after the other."""

    def __init__(self, artifact, *actions):
        super().__init__(artifact, None)
        self.actions = list(actions)

    @contextmanager
    def stage(self, name, total, unit):
        yield self

    def advance(self, count=1, **facts):
        self.steps_shown += count
        found = {path.name for path in Path(self.artifact.path(STORAGE)).glob("*/checkpoint_*")}
        if facts and self.actions and found - set(self.acted_at):
            self.acted_at += found
            self.actions.pop(0)()


@pytest.mark.parametrize("actions", [(interrupt,), pytest.param((kill_a_worker, interrupt), marks=pytest.mark.wide)])
def test_sharded_workers_that_are_disturbed_go_on_as_one(local_ray, job, actions):
    """Two workers, each with its shard. The driver is interrupted, before that one may be killed; then there is room for one only."""
    changes = {"learning_rate": 1e-2, "tokens": 60 * 64, "checkpoint_every": 10, "parallel": "fsdp", "min_workers": 1}
    expected = another(job, f"sharded, serial, {len(actions)}", **changes)
    distill_child(expected, Quiet())
    mine = another(job, f"sharded, {len(actions)}", **changes)
    progress = Reported(mine.artifact, *actions)
    with pytest.raises(KeyboardInterrupt):
        run_gkd(mine, cluster=CLUSTER, progress=progress, cpus_per_worker=1)
    assert not progress.actions and not mine.artifact.finished
    kept = Path(mine.artifact.path(STORAGE))
    assert list(kept.rglob(RUN)) and not pickles_in(kept)
    run_gkd(mine, cluster=CLUSTER, progress=Quiet(), cpus_per_worker=3)
    assert mine.artifact.finished and not mine.artifact.exists(STORAGE)
    curves = [rows_from_parquet(each.artifact.read(CURVE), GkdRow)[0] for each in (mine, expected)]
    assert [row.step for row in curves[0]] == list(range(60))
    assert max(abs(a.loss - b.loss) for a, b in zip(*curves, strict=True)) < 1e-4
    facts = [each.artifact.facts() for each in (mine, expected)]
    assert facts[0]["kept"] == facts[1]["kept"] and facts[0]["heldout_kl"] == pytest.approx(facts[1]["heldout_kl"], abs=1e-4)
    weights = [load_model(each.artifact.local_folder(CHILD)).state_dict() for each in (mine, expected)]
    assert all(torch.allclose(value, weights[1][name], atol=2e-3) for name, value in weights[0].items())


def test_what_a_preempted_node_takes_with_it_is_no_failure():
    assert preempted(RayActorError(preempted=True)) and not preempted(RayActorError()) and not preempted(ValueError())


def test_a_diverging_run_is_not_tried_again(local_ray, job):
    mine = dataclasses.replace(another(job, "diverged", learning_rate=1e30, max_failures=-1), heldout=())
    with pytest.raises(Diverged, match="lower gkd.learning_rate"):
        run_gkd(mine, cluster=CLUSTER, progress=Quiet(), cpus_per_worker=1)
    assert not mine.artifact.finished


def test_workers_that_cannot_be_placed_are_not_waited_for(local_ray, job):
    mine = another(job, "unplaced")
    with pytest.raises(ClusterError, match="2 workers with 1000 CPUs each did not start"):
        run_gkd(mine, cluster=ClusterConfig(placement_timeout_s=2), progress=Quiet(), cpus_per_worker=1000)


def test_failures_are_counted_from_the_last_step_that_was_saved():
    failures = Failures(limit=2)
    for saved in (0, 0, 20, 20, 40, 40):
        failures.add(saved, "killed")
    with pytest.raises(ClusterError, match="workers failed 3 times since 40 steps were saved; the last time: killed"):
        failures.add(40, "killed")
    for _ in range(9):
        Failures(limit=-1).add(0, "killed")


def test_a_controller_that_died_is_told_and_the_same_command_continues():
    error = told(ActorDiedError())
    assert isinstance(error, ClusterError)
    assert str(error) == "gkd: Ray Train's controller died; the same command continues from the last checkpoint"
    assert told(Diverged(3, math.inf, 1.0)).args[0] == 3
    assert "the workers failed (no such file); see the workers' logs" in str(told(OSError("no such file")))
