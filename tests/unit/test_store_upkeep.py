"""Listing, verifying, counting and clearing a whole store."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from s3_server import s3_bucket

from puzzle_ray.errors import StoreError
from puzzle_ray.store import Problem, Store
from puzzle_ray.store.lease import leases
from puzzle_ray.store.upkeep import artifact_named, artifacts, bytes_by_stage, collect_garbage, verify

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def s3_url():
    with s3_bucket() as url:
        yield url


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    """tokens <- library <- report, all finished, and a child that is not."""
    root = str(tmp_path / "store") if request.param == "folder" else f"{request.getfixturevalue('s3_url')}/{tmp_path.name}"
    store, key = Store(root), "parent"
    for stage, size in (("tokens", 1000), ("library", 3000), ("report", 10)):
        artifact = store.artifact(stage, {"size": size}, {"made from": key})
        artifact.write("data.bin", bytes(size))
        artifact.finish({"size": size})
        key = artifact.key
    store.artifact("child", {}, {}).write_json("items/a.json", 1)
    return store


def test_what_there_is(store):
    found = {listed.stage: listed for listed in artifacts(store)}
    assert {stage: listed.state for stage, listed in found.items()} == {
        "tokens": "finished", "library": "finished", "report": "finished", "child": "unfinished"
    }  # fmt: skip
    library = found["library"]
    assert library.facts == {"size": 3000} and library.inputs == {"made from": found["tokens"].key} and library.bytes > 3000
    assert library.finished_at[:2] == "20" and abs(library.written_at - time.time()) < 600
    usage = bytes_by_stage(store)
    assert list(usage) == ["library", "tokens", "report", "child"] and usage["library"] == library.bytes
    assert artifact_named(store, library.name).facts() == {"size": 3000}
    for name in ("library", "library-0123456789ab", "../library-0123456789ab"):
        with pytest.raises(StoreError, match="names? "):
            artifact_named(store, name)


def test_verifying_all_or_one(store):
    found = {listed.stage: listed for listed in artifacts(store)}
    assert verify(store) == {found[stage].name: [] for stage in ("tokens", "library", "child", "report")}
    name = found["library"].name
    store.filesystem.pipe_file(f"{store.root}/{name}/data.bin", bytes(2999) + b"1")
    wrong = [Problem("data.bin", "is damaged (its checksum is not the one that was written)")]
    assert verify(store)[name] == wrong and verify(store, [name]) == {name: wrong}
    assert str(wrong[0]) == "data.bin is damaged (its checksum is not the one that was written)"


def test_what_may_go(store):
    assert collect_garbage(store) == [], "all of it is new"
    report, child = (next(listed.name for listed in artifacts(store) if listed.stage == stage) for stage in ("report", "child"))
    would = collect_garbage(store, older_than_days=-1)
    assert {(garbage.name, garbage.why) for garbage in would} == {
        (report, "no finished artifact was made from it"),
        (child, "it is unfinished"),
    }
    assert len(artifacts(store)) == 4 and all(garbage.bytes > 0 for garbage in would)
    with artifact_named(store, child).lease():
        assert collect_garbage(store, older_than_days=-1, dry_run=False) == [], "the run that works on it may read the others"
    assert {garbage.name for garbage in collect_garbage(store, older_than_days=-1, dry_run=False)} == {report, child}
    left = collect_garbage(store, older_than_days=-1, dry_run=False)
    assert {garbage.name.partition("-")[0] for garbage in left} == {"library"}
    assert [listed.stage for listed in artifacts(store)] == ["tokens"] and leases(store) == []


def test_what_dead_processes_left(tmp_path):
    store = Store(str(tmp_path))
    code = (
        "import os, signal, sys; from puzzle_ray.store import Store; step = Store(sys.argv[1]).artifact('s', {}, {})\n"
        "with step.lease(), step.folder_to_publish('child') as folder:\n"
        "    (folder / 'half').write_text('x'); open(sys.argv[1] + '/.probe~' + folder.name.split('~', 1)[1], 'w').write('ok')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=240)
    done = store.artifact("done", {}, {})
    done.write("a", b"1")
    done.finish({})
    os.makedirs(done.path(".ray-train/run"))
    (folder,) = (name for name in os.listdir(tmp_path) if name.startswith("s-"))
    (scratch,) = os.listdir(tmp_path / folder)
    names = {f"{folder}/{scratch}", f"{done.name}/.ray-train", f".leases/{folder}.1"}
    whole = {garbage.name for garbage in collect_garbage(store, older_than_days=-1)}
    assert done.name in whole and f"{done.name}/.ray-train" not in whole, "what goes with its artifact is counted once"
    found = collect_garbage(store)
    assert names < {garbage.name for garbage in found} and len(found) == 4
    assert collect_garbage(store, dry_run=False) == found and collect_garbage(store) == []
    assert sorted(os.listdir(tmp_path)) == sorted([done.name, folder]) and os.listdir(tmp_path / folder) == []
    assert (
        done.finished and os.listdir(done.url) == ["a", "artifact.json"] or sorted(os.listdir(done.url)) == ["a", "artifact.json"]
    )
