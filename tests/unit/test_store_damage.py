"""What is not as it was written is seen, said in one line, and made again: that and nothing else."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from s3_server import s3_bucket

from puzzle_ray.errors import Damaged, StoreError
from puzzle_ray.store import RECORD, Store
from puzzle_ray.store.record import Record


@pytest.fixture(scope="module")
def s3_url():
    with s3_bucket() as url:
        yield url


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    root = str(tmp_path / "store") if request.param == "folder" else f"{request.getfixturevalue('s3_url')}/{tmp_path.name}"
    return Store(root)


def made(store, items=("a", "b", "c")):
    """A small stage with items, a published folder and a table; returns the artifact and the items it had to make."""
    step, done = store.artifact("stage", {}, {}), []
    for name in items:
        if not step.exists(f"items/{name}.json"):
            step.write_json(f"items/{name}.json", [name] * 20)
            done.append(name)
    if "t.safetensors" not in step.names():
        step.write_tensors("t.safetensors", {"t": torch.arange(100.0)})
        done.append("t")
    if "child" not in step.names():
        with step.folder_to_publish("child") as folder:
            (folder / "config.json").write_text("{}")
            (folder / "weights").write_bytes(bytes(range(256)))
        done.append("child")
    step.finish({"n": 1})
    return step, done


def again(store):
    """A new process's view: nothing is remembered."""
    from puzzle_ray.store import files

    files._KNOWN.clear()
    return store.artifact("stage", {}, {})


def overwrite(step, name, change):
    data = step.store.filesystem.cat_file(step.path(name))
    step.store.filesystem.pipe_file(step.path(name), change(data))


def flip(data):
    """One bit, somewhere."""
    position = random.Random(len(data)).randrange(len(data))
    return data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]


READERS = {
    "items/b.json": lambda step: step.read_json("items/b.json"),
    "t.safetensors": lambda step: step.read_tensors("t.safetensors"),
    "child/weights": lambda step: step.local_folder("child"),
}
CHANGES = {"flipped": flip, "cut": lambda data: data[:-1], "empty": lambda data: b"", "longer": lambda data: data + b"0"}


CASES = [(store, name, change) for store in ("folder", "s3") for name in READERS for change in (*CHANGES, "gone")]


@pytest.mark.parametrize(
    ("store", "name", "change"), [c for c in CASES if c[0] == "folder" or c[2] in ("flipped", "gone")], indirect=["store"]
)
def test_a_damaged_file_is_named_and_made_again(store, name, change):
    step, done = made(store)
    assert done == ["a", "b", "c", "t", "child"] and again(store).finished
    if change == "gone":
        store.filesystem.rm(step.path(name))
    else:
        overwrite(step, name, CHANGES[change])
    seen = again(store)
    assert seen.state() == ("finished" if change == "flipped" else "damaged")
    with pytest.raises(Damaged, match=f"^stage: .*{name} is (damaged|missing).*; run the command that made it again: ") as error:
        READERS[name](seen)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert again(store).state() == "damaged", "the next run knows of a flipped bit, too"
    with pytest.raises(Damaged):
        READERS[name](again(store))
    lost = {"items/b.json": "b", "t.safetensors": "t", "child/weights": "child"}[name]
    repaired = again(store)
    assert repaired.discard_damage() == [{"child": "child"}.get(lost, name)] and repaired.state() == "unfinished"
    repaired, done = made(store)
    assert done == [lost] and again(store).state() == "finished" and again(store).verify() == []
    READERS[name](again(store))
    assert [hidden for hidden in store.names(step.url) if hidden.startswith(".")] == []


@pytest.mark.parametrize("change", [*CHANGES, "older schema"])
def test_a_damaged_record_is_not_finished(store, change):
    step, _ = made(store)
    older = lambda data: json.dumps(json.loads(data) | {"schema": 2}).encode()  # noqa: E731
    overwrite(step, RECORD, CHANGES.get(change, older))
    seen = again(store)
    assert seen.state() == "damaged" and not seen.finished
    with pytest.raises(Damaged, match="artifact.json cannot be read"):
        seen.facts()
    assert [problem.file for problem in seen.verify()] == [RECORD]
    assert seen.discard_damage() == [] and seen.state() == "unfinished"
    assert made(store)[1] == [] and again(store).finished and again(store).facts() == {"n": 1}


def test_a_false_alarm_ends_with_a_look_at_every_file(store):
    step, _ = made(store)
    store.filesystem.pipe_file(step.path(".damaged"), b"t.safetensors is damaged")
    seen = again(store)
    assert seen.state() == "damaged" and seen.discard_damage() == [] and seen.state() == "finished"


def test_damage_is_not_signed_over(store):
    """`finish` neither takes damaged files for good ones, nor loses the record that tells them."""
    step, _ = made(store)
    overwrite(step, "items/b.json", lambda data: data[:-1])
    with pytest.raises(Damaged, match="items/b.json is damaged"):
        again(store).finish({"n": 2})
    assert again(store).state() == "damaged"


@pytest.mark.parametrize("content", [b"", b'{"a": [1, 2', b"\x08\0\0\0\0\0\0\0{}"])
def test_an_unfinished_artifact_drops_what_is_not_whole(store, content):
    step = store.artifact("stage", {}, {})
    for name in ("items/a.json", "items/b.json"):
        step.write_json(name, [1])
    step.write_tensors("good.safetensors", {"t": torch.arange(3)})
    step.write_tensors("bad.safetensors", {"t": torch.arange(3)})
    store.filesystem.pipe_file(step.path("items/b.json"), content)
    store.filesystem.pipe_file(step.path("bad.safetensors"), content)
    seen = again(store)
    for read in (lambda: seen.read_json("items/b.json"), lambda: seen.read_tensors("bad.safetensors")):
        with pytest.raises(Damaged, match="run the command that made it again"):
            read()
    assert seen.discard_damage() == ["bad.safetensors", "items/b.json"] and seen.state() == "unfinished"
    assert seen.names() == ["good.safetensors", "items"] and seen.names("items") == ["a.json"]


def test_every_flipped_bit_of_a_file_is_seen(tmp_path):
    step = Store(str(tmp_path)).artifact("stage", {}, {})
    step.write("t.bin", bytes(range(40)))
    step.finish({})
    good = step.read("t.bin")
    for bit in range(len(good) * 8):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        with open(step.path("t.bin"), "wb") as file:
            file.write(data)
        with pytest.raises(Damaged, match="t.bin is damaged"):
            again(step.store).read("t.bin")


def test_every_flipped_bit_of_a_record_is_seen(tmp_path):
    """Or changes nothing: white space, and one letter of an escape, may be written in two ways."""
    step = Store(str(tmp_path)).artifact("stage", {"a": 1}, {"b": "c"})
    step.write("t.bin", b"1")
    step.finish({"n": 1})
    good = step.read(RECORD)
    for bit in range(len(good) * 8):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        try:
            same = json.loads(bytes(data)) == json.loads(good)
        except ValueError:
            same = False
        assert Record.from_json(bytes(data)) == (Record.from_json(good) if same else None), bit


def test_another_process_verifies_and_remembers(tmp_path):
    """The checksum is computed once per process; a file that changed since is read again."""
    step, _ = made(Store(str(tmp_path)))
    step.read("t.safetensors")
    mtime = os.stat(step.path("t.safetensors")).st_mtime_ns
    overwrite(step, "t.safetensors", flip)
    os.utime(step.path("t.safetensors"), ns=(mtime + 1, mtime + 1))
    with pytest.raises(Damaged):
        step.read_tensors("t.safetensors")
    code = "import sys; from puzzle_ray.store import Store; Store(sys.argv[1]).artifact('stage', {}, {}).read('t.safetensors')"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert "errors.Damaged: stage: " in done.stderr


def test_damage_in_a_store_that_cannot_be_written_says_what_to_remove(tmp_path, monkeypatch):
    step, _ = made(Store(str(tmp_path)))
    overwrite(step, "t.safetensors", flip)

    def refused(path, data, **options):
        raise PermissionError(path)

    seen = again(step.store)
    monkeypatch.setattr(seen.store.filesystem, "pipe_file", refused)
    with pytest.raises(Damaged, match=r"; remove \S+t.safetensors, then run the command that made it again"):
        seen.read("t.safetensors")


def test_an_error_survives_the_trip_between_processes():
    import pickle

    error = pickle.loads(pickle.dumps(Damaged("stage", "a is damaged", "again")))
    assert isinstance(error, StoreError) and str(error) == "stage: a is damaged; again"
