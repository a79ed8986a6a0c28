"""One run at a time on an artifact: the second waits and reuses, a dead one's place is taken, and whoever lost its place notices."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from s3_server import s3_bucket
from waiting import until

from puzzle_ray.errors import StoreError
from puzzle_ray.store import Store
from puzzle_ray.store import lease as leases_module
from puzzle_ray.store.lease import leases

ROOT = Path(__file__).parents[2]
QUICK = "from puzzle_ray.store import lease; lease.BEAT_EVERY_S, lease.LOOK_EVERY_S, lease.DEAD_AFTER_S = 0.1, 0.05, 3.0\n"
ELSEWHERE = "lease.process_space = lambda: 'another machine'\n"


@pytest.fixture(scope="module")
def s3_url():
    with s3_bucket() as url:
        yield url


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    root = str(tmp_path / "store") if request.param == "folder" else f"{request.getfixturevalue('s3_url')}/{tmp_path.name}"
    return Store(root)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, value in {"BEAT_EVERY_S": 0.1, "LOOK_EVERY_S": 0.05, "DEAD_AFTER_S": 3.0}.items():
        monkeypatch.setattr(leases_module, name, value)


def started(code, *args, **options):
    """A process that runs `code`; what it prints can be read line by line."""
    command = [sys.executable, "-c", "import sys\nfrom puzzle_ray.store import Store\n" + QUICK + code, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


HOLD = """
import time
artifact = Store(sys.argv[1]).artifact("stage", {}, {})
with artifact.lease():
    artifact.write("item", b"1")
    print("holds", flush=True)
    time.sleep(float(sys.argv[2]))
    artifact.finish({"by": "the first"})
"""


def test_the_second_waits_says_for_whom_and_reuses(store):
    first, said = started(HOLD, store.root, 1.0), []
    assert first.stdout.readline() == "holds\n"
    artifact = store.artifact("stage", {}, {})
    assert artifact.state() == "unfinished"
    with artifact.lease(say=said.append):
        assert artifact.finished and artifact.facts() == {"by": "the first"}
    assert first.wait(240) == 0
    (line,) = said
    assert re.fullmatch(rf"\[stage\] waits for process {first.pid} on \S+, at work since [-0-9]+ [:0-9]+ UTC", line)
    assert leases(store) == [] and store.names(store.root) == [artifact.name]


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_dead_one_is_replaced(store, where, monkeypatch):
    """On the same machine at once; elsewhere when its file has not changed for a while."""
    if where == "here":
        monkeypatch.setattr(leases_module, "DEAD_AFTER_S", 1000.0)
    first = started((ELSEWHERE if where == "elsewhere" else "") + HOLD, store.root, 60)
    assert first.stdout.readline() == "holds\n"
    first.kill()  # and not reaped yet: a zombie is dead, too
    begun = time.monotonic()
    with store.artifact("stage", {}, {}).lease(timeout_s=240) as mine:
        assert where == "here" or time.monotonic() - begun > 3.0
        assert mine.claim.generation == 2 and len(leases(store)) == 1
    first.wait(240)
    assert leases(store) == []


def test_a_living_one_elsewhere_is_waited_for(store):
    first = started(ELSEWHERE + HOLD, store.root, 60)
    try:
        assert first.stdout.readline() == "holds\n"
        with (
            pytest.raises(StoreError, match=rf"stage-\w+ is being worked on by process {first.pid} on .*; wait for it to end"),
            store.artifact("stage", {}, {}).lease(timeout_s=7.0),
        ):
            pass
    finally:
        first.kill()
        first.wait(240)


def test_who_stood_still_too_long_notices_before_it_finishes(store):
    """Stopped, replaced, and continued: it finishes nothing, and the other's record stands."""
    first = started(ELSEWHERE + HOLD, store.root, 2.0)
    assert first.stdout.readline() == "holds\n"
    first.send_signal(signal.SIGSTOP)
    artifact = store.artifact("stage", {}, {})
    with artifact.lease(timeout_s=240) as mine:
        first.send_signal(signal.SIGCONT)
        assert first.wait(240) == 1
        mine.check()
        artifact.finish({"by": "the second"})
    error = first.stderr.read()
    seen = rf"(was taken over by process {os.getpid()} on |is gone)"  # gone where the second ended before the first looked
    assert re.search(rf"this run lost stage-\w+ while it worked on it: it {seen}", error)
    assert store.artifact("stage", {}, {}).facts() == {"by": "the second"} and leases(store) == []


def test_workers_of_one_that_lost_it_finish_nothing(store):
    """An artifact takes along for whom it is worked on."""
    import pickle

    artifact = store.artifact("stage", {}, {})
    with artifact.lease() as mine:
        worker = pickle.loads(pickle.dumps(artifact))
        worker.write("item", b"1")
        worker._check_lease()
        (found,) = leases(store)
        store.filesystem.pipe_file(
            f"{store.root}/.leases/{artifact.name}.2", found.content.replace(b'"token": "', b'"token": "x')
        )
        with pytest.raises(StoreError, match=r"the run that works on stage-\w+ lost it: it was taken over by process"):
            worker.finish({})
        until(lambda: mine.lost, "the holder notices by itself")
        with pytest.raises(StoreError, match="this run lost"):
            artifact.write("item", b"2")
        store.filesystem.rm_file(f"{store.root}/.leases/{artifact.name}.2")
    assert not artifact.finished


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_released_however_the_block_ends(store, error):
    artifact = store.artifact("stage", {}, {})
    with pytest.raises(error), artifact.lease():
        raise error
    assert leases(store) == [] and artifact.claim is None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lease-")]


def test_different_artifacts_do_not_wait_for_each_other(store):
    with store.artifact("stage", {}, {}).lease(), store.artifact("stage", {"a": 1}, {}).lease(timeout_s=0):
        assert len(leases(store)) == 2
    assert leases(store) == []


def test_a_file_cut_short_by_a_kill_does_not_last(tmp_path):
    """Whoever was killed between creating its file and writing it is judged by its file's age, as it is watched."""
    store = Store(str(tmp_path))
    artifact = store.artifact("stage", {}, {})
    (tmp_path / ".leases").mkdir()
    (tmp_path / ".leases" / f"{artifact.name}.1").write_bytes(b"")
    with artifact.lease(timeout_s=240) as mine:
        assert mine.claim.generation == 2


def test_finished_artifacts_keep_nothing_hidden(tmp_path):
    artifact = Store(str(tmp_path)).artifact("stage", {}, {})
    with artifact.lease():
        (Path(artifact.url) / ".ray-train" / "run").mkdir(parents=True)
        with artifact.folder_to_publish("child") as folder:
            (folder / "a").write_text("a")
        artifact.finish({})
    assert sorted(os.listdir(artifact.url)) == ["artifact.json", "child"] and os.listdir(tmp_path) == [artifact.name]


def test_a_store_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"), Store(str(tmp_path / "file" / "x")).artifact("s", {}, {}).lease():
        pass


CONTENDER = """
import os, random, time
lease.DEAD_AFTER_S = 1000.0  # a busy machine starves a heartbeat: here nobody but the dead is dead
artifact, log = Store(sys.argv[1]).artifact("stage", {}, {}), sys.argv[2]
def note(word):
    descriptor = os.open(log, os.O_APPEND | os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, f"{time.monotonic_ns()} {os.getpid()} {word}\\n".encode())
    os.close(descriptor)
while True:
    with artifact.lease(say=lambda line: None):
        note("in")
        time.sleep(random.uniform(0, 0.02))
        note("out")
    time.sleep(random.uniform(0, 0.01))
"""


@pytest.mark.parametrize("seed", range(3))
def test_never_two_at_once_whoever_is_killed_whenever(tmp_path, seed):
    """Five processes take turns and are killed at random moments: between one's "in" and its "out" or its death nobody else is in."""
    rng, log, killed = random.Random(seed), tmp_path / "log", {}
    processes = [started(CONTENDER, tmp_path / "store", log) for _ in range(5)]
    try:
        until(lambda: log.exists() and log.read_text().count("out") >= 5, "turns are taken")
        for _ in range(12):
            time.sleep(rng.uniform(0.0, 0.2))
            victim = processes.pop(rng.randrange(len(processes)))
            killed[victim.pid] = time.monotonic_ns()
            victim.kill()
            victim.wait(240)
            processes.append(started(CONTENDER, tmp_path / "store", log))
        turns = log.read_text().count("out")
        until(lambda: log.read_text().count("out") >= turns + 5, "turns are taken after all that")
    finally:
        for process in processes:
            killed[process.pid] = time.monotonic_ns()  # the next one may come in before it is killed itself
            process.kill()
            process.wait(240)
    inside = None
    for line in log.read_text().splitlines():
        at, pid, word = line.split()
        if word == "out":
            assert inside == pid
            inside = None
        else:
            assert inside is None or int(at) > killed.get(int(inside), int(at)), f"{pid} came in while {inside} was in"
            inside = pid


def test_turns_on_an_object_store(s3_url, tmp_path):
    """Three processes contend for a lease on S3, and one is killed."""
    log, root = tmp_path / "log", f"{s3_url}/turns"
    processes = [started(CONTENDER, root, log) for _ in range(3)]
    try:
        until(lambda: log.exists() and log.read_text().count("out") >= 3, "turns are taken")
        processes[0].kill()
        processes[0].wait(240)
        turns = log.read_text().count("out")
        until(lambda: log.read_text().count("out") >= turns + 4, "turns are taken after that")
    finally:
        for process in processes:
            process.kill()
            process.wait(240)
    inside = None
    for line in log.read_text().splitlines():
        _, pid, word = line.split()
        assert (inside == pid) if word == "out" else inside in (None, str(processes[0].pid))
        inside = None if word == "out" else pid


RUN = """
import os, time
def note(word):
    descriptor = os.open(sys.argv[2], os.O_APPEND | os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, f"{os.getpid()} {word}\\n".encode())
    os.close(descriptor)
def work(artifact, items=4):
    for item in range(items):
        if not artifact.exists(f"items/{item}.json"):
            note(f"{artifact.stage} {item}")
            time.sleep(0.1)
            artifact.write_json(f"items/{item}.json", item)
    with artifact.folder_to_publish("child") as folder:
        (folder / "weights").write_text(artifact.stage)
    artifact.finish({"items": items})
store, key = Store(sys.argv[1]), "start"
for stage in ("one", "two", "three"):
    artifact = store.artifact(stage, {}, {"from": key})
    if not artifact.finished:
        with artifact.lease(say=lambda line: note("waits")):
            if not artifact.finished:
                artifact.discard_damage()
                work(artifact)
    key = artifact.key
note("ends " + str(artifact.facts()))
"""
WORK = [f"{stage} {item}" for stage in ("one", "two", "three") for item in range(4)]


def did(log):
    """(process, what it did) in order."""
    return [tuple(line.split(" ", 1)) for line in log.read_text().splitlines()] if log.exists() else []


def test_two_runs_do_the_work_once(store, tmp_path):
    log = tmp_path / "log"
    runs = [started(RUN, store.root, log) for _ in range(2)]
    assert [run.communicate(timeout=240)[1] for run in runs] == ["", ""]
    words = [word for _, word in did(log)]
    assert [word for word in words if word in WORK] == WORK, "each item once, in order"
    assert words.count("ends {'items': 4}") == 2 and "waits" in words
    assert store.artifact("one", {}, {"from": "start"}).finished and leases(store) == []


def test_a_run_takes_over_from_one_that_is_killed(store, tmp_path):
    log = tmp_path / "log"
    runs = {str(run.pid): run for run in (started(RUN, store.root, log) for _ in range(2))}
    until(lambda: "two 1" in [word for _, word in did(log)], "the second stage is begun", 120)
    victim = next(pid for pid, word in did(log) if word == "two 1")
    runs[victim].kill()
    (other,) = (run for pid, run in runs.items() if pid != victim)
    assert other.communicate(timeout=240)[1] == "" and other.returncode == 0
    runs[victim].communicate(timeout=240)
    done = [(pid, word) for pid, word in did(log) if word in WORK]
    assert [word for pid, word in done if pid == str(other.pid) and word[:5] == "three"] == WORK[8:]
    assert sorted({word for _, word in done}) == sorted(WORK) and len(done) <= len(WORK) + 1, "all but the item it died in once"
    assert leases(store) == [] and len(store.names(store.root)) == 3
