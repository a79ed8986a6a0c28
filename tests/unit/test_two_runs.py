"""The same config twice at once on one store: every stage is done once, both runs end alike, and a killed run's work is taken over."""

import json
import os
import signal
import subprocess
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from s3_server import s3_bucket
from small_runs import SMALL, save_parent_with_text
from waiting import until

from puzzle_ray.store import Store
from puzzle_ray.store.lease import leases
from puzzle_ray.store.upkeep import artifacts, verify

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parents[1] / "recorded_run.py"
STAGES = {"tokens", "profile", "library", "scores", "architecture", "child", "gkd", "evaluation", "quality"}


@pytest.fixture(scope="module")
def s3_url():
    with s3_bucket() as url:
        yield url


@pytest.fixture(scope="module")
def parent_with_text(tmp_path_factory):
    return save_parent_with_text(tmp_path_factory.mktemp("parent"))


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    root = str(tmp_path / "store") if request.param == "folder" else f"{request.getfixturevalue('s3_url')}/{tmp_path.name}"
    return Store(root)


@pytest.fixture
def started(warm_python, parent_with_text):
    return partial(starting, warm_python.executable, parent_with_text)


@contextmanager
def starting(python, parent_with_text, store, log, *, count):
    """So many runs of the same config, each in a process of its own; none is left behind."""
    parent, text = parent_with_text
    words = json.dumps(SMALL | {"parent": str(parent), "data.train": str(text), "store": store.root})
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [str(python), str(SCRIPT), str(log), "compress", words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, env=environment, **pipes) for _ in range(count)]
    try:
        yield runs
    finally:
        for run in runs:
            run.kill()
            run.wait()


def lines(log):
    """(process, artifact, file) of everything that was added to the store."""
    rows = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [(int(pid), *path.split("/", 1)) for pid, path in rows]


def ended(run):
    """What it printed, parsed, and its stderr."""
    out, err = run.communicate(timeout=900)
    assert run.returncode == 0, err
    return json.loads(out), err


def whole(store):
    """Asserts that all is finished, nothing damaged, and nothing left lying about."""
    found = {listed.stage: listed.state for listed in artifacts(store)}
    assert {stage for stage, state in found.items() if state == "finished"} == STAGES and set(found) <= STAGES | {"exact_scores"}
    assert not any(verify(store).values()) and not leases(store)
    assert not [name for listed in artifacts(store) for name in store.sizes(listed.url) if name.startswith(".")]


def test_two_runs_at_once_do_every_stage_once(started, store, tmp_path):
    log = tmp_path / "log"
    with started(store, log, count=2) as runs:
        (one, _), (other, _) = map(ended, runs)
    assert one == other and one["child"].startswith(store.root)
    written = lines(log)
    again = {"checkpoint.safetensors"}  # and those of layers: written over by the same run as it goes on
    counts = Counter((artifact, file) for _, artifact, file in written if file not in again and "checkpoints/" not in file)
    assert {artifact.rpartition("-")[0] for artifact, _ in counts} >= STAGES
    assert set(counts.values()) == {1}, [name for name, count in counts.items() if count > 1]
    by_artifact = {artifact: {pid for pid, name, _ in written if name == artifact} for _, artifact, _ in written}
    assert all(len(processes) == 1 for processes in by_artifact.values()), "a stage is one run's"
    whole(store)


def test_the_work_of_a_killed_run_is_taken_over(started, store, tmp_path):
    """The one that trains the library dies in the middle; the other goes on from its last checkpoint, in seconds."""
    log = tmp_path / "log"
    trained = lambda: [row for row in lines(log) if "/layer_000" in row[2]]  # noqa: E731
    with started(store, log, count=2) as runs:
        until(trained, "the library is in training", 120)
        (victim,) = {pid for pid, artifact, _ in trained()}
        os.kill(victim, signal.SIGKILL)
        killed_at = time.monotonic()
        until(lambda: any(pid != victim and name.startswith("library-") for pid, name, _ in lines(log)), "it goes on", 60)
        assert time.monotonic() - killed_at < 60
        (survivor,) = [run for run in runs if run.poll() is None]
        ended(survivor)
    finished = [(pid, name) for pid, name, file in lines(log) if file == "artifact.json"]
    assert len({name for _, name in finished}) == len(finished) == len(STAGES), "no record is written twice"
    others = {pid for pid, name in finished if name.startswith(("library-", "gkd-", "evaluation-"))}
    assert len(others) == 1 and victim not in others
    whole(store)
