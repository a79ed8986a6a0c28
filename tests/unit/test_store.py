"""What exists in a store is complete; keys depend on everything a stage depends on."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from s3_server import s3_bucket

from puzzle_ray.errors import StoreError
from puzzle_ray.store import Store, content_key


def test_key_changes_with_stage_settings_and_inputs():
    base = ("library", {"tokens": 1, "lr": 0.1}, {"parent": "a"})
    keys = {
        content_key(*base),
        content_key("scores", *base[1:]),
        content_key("library", {"tokens": 2, "lr": 0.1}, {"parent": "a"}),
        content_key("library", base[1], {"parent": "b"}),
    }
    assert len(keys) == 4
    assert content_key("library", {"lr": 0.1, "tokens": 1}, {"parent": "a"}) == content_key(*base)


def test_key_refuses_what_has_no_stable_form():
    with pytest.raises(TypeError):
        content_key("x", {"f": object()}, {})


def test_a_step_is_finished_only_by_its_record(tmp_path):
    step = Store(str(tmp_path)).artifact("s", {}, {})
    step.write("a.bin", b"1")
    assert not step.finished
    step.finish({"n": 3})
    assert step.finished and step.facts() == {"n": 3} and step.names() == ["a.bin", "artifact.json"]


def test_tensors_and_metadata_round_trip(tmp_path):
    step = Store(str(tmp_path)).artifact("s", {}, {})
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.int32), "c": torch.randn(2).bfloat16()}
    step.write_tensors("t.safetensors", tensors, {"k": "v"})
    back, about = step.read_tensors("t.safetensors")
    assert about == {"k": "v"} and all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tensors.items())


def test_tensors_are_written_from_where_they_are_as_safetensors_writes_them(tmp_path, monkeypatch):
    import safetensors.torch
    from safetensors import SafetensorError

    step = Store(str(tmp_path)).artifact("s", {}, {})
    tensors = {"b": torch.randn(3, 4).T, "a": torch.randn(5).bfloat16(), "none": torch.empty(0)}
    expected = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, metadata={"k": "v"})
    monkeypatch.setattr(safetensors.torch, "save", lambda *given, **named: pytest.fail("a whole file in memory"))
    step.write_tensors("below/t.safetensors", tensors, {"k": "v"})
    step.write("t.bin", b"1")
    found, other = Path(step.path("below/t.safetensors")), Path(step.path("t.bin"))
    assert found.read_bytes() == expected and found.stat().st_mode == other.stat().st_mode

    def full(*given, **named):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(StoreError, match="t.safetensors cannot be written .No space left"):
        step.write_tensors("below/t.safetensors", {"a": torch.ones(2)})
    assert found.read_bytes() == expected and os.listdir(found.parent) == [found.name]
    step.finish({})
    assert Store(str(tmp_path)).artifact("s", {}, {}).verify() == []


@pytest.mark.parametrize("root", ["local", "memory://ordered"])
def test_equal_tensors_and_metadata_are_equal_files(tmp_path, root):
    """safetensors itself writes metadata in another order every time."""
    step = Store(str(tmp_path) if root == "local" else root).artifact("s", {}, {})
    about = {name: f'"{name}" é\n' for name in "fbdaec"}
    written = set()
    for number in range(6):
        step.write_tensors(f"{number}.safetensors", {"t": torch.arange(3)}, about)
        written.add(step.store.filesystem.cat_file(step.path(f"{number}.safetensors")))
    assert len(written) == 1
    back, found = step.read_tensors("0.safetensors")
    assert found == about and torch.equal(back["t"], torch.arange(3))


def test_full_disk_leaves_the_old_file_and_no_scraps(tmp_path, monkeypatch):
    step = Store(str(tmp_path)).artifact("s", {}, {})
    step.write("a.bin", b"old")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        step.write("a.bin", b"new")
    assert step.read("a.bin") == b"old" and sorted(os.listdir(step.url)) == [".written", "a.bin"]
    assert os.listdir(f"{step.url}/.written") == ["a.bin"]


def test_a_published_folder_appears_whole_or_not_at_all(tmp_path):
    step = Store(str(tmp_path)).artifact("s", {}, {})
    with pytest.raises(ValueError), step.folder_to_publish("child") as folder:
        (folder / "half").write_text("x")
        raise ValueError
    assert step.names() == []
    with step.folder_to_publish("child") as folder:
        (folder / "whole").write_text("x")
    assert os.listdir(step.local_folder("child")) == ["whole"]


def test_scratch_of_a_killed_process_goes_and_that_of_a_living_one_stays(tmp_path):
    code = (
        "import os, signal, sys; from puzzle_ray.store import Store; step = Store(sys.argv[1]).artifact('s', {}, {})\n"
        "with step.folder_to_publish('child') as folder: (folder / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=240)
    step = Store(str(tmp_path)).artifact("s", {}, {})
    (left,) = os.listdir(step.url)
    assert killed.returncode == -signal.SIGKILL and left.startswith(".child~")
    namesake = f".child~{socket.gethostname()}~{2**22 + 1}~0"  # containers may share a host's name, and not its process ids
    os.mkdir(step.path(namesake))
    elsewhere = ".child~another-machine~1~0"
    os.mkdir(step.path(elsewhere))
    with step.folder_to_publish("child") as ours:
        (ours / "ours").write_text("x")
        with step.folder_to_publish("child") as other:
            (other / "other").write_text("x")
        assert ours.is_dir() and left not in os.listdir(step.url)
    assert set(os.listdir(step.url)) == {namesake, elsewhere, "child", ".child.published"}
    Path(step.path(elsewhere), "half").write_text("x")
    for path in (step.path(elsewhere), step.path(namesake)):
        os.utime(path, (0, 0))
    step.finish({})
    assert sorted(os.listdir(step.url)) == [elsewhere, "artifact.json", "child"], "a file in it was written just now"
    os.utime(step.path(f"{elsewhere}/half"), (0, 0))
    step.finish({})
    assert sorted(os.listdir(step.url)) == ["artifact.json", "child"]


def test_unwritable_store_is_refused_with_its_name(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        Store(str(file / "below")).check()


def test_missing_file_says_which(tmp_path):
    with pytest.raises(StoreError, match="nothing.bin is missing"):
        Store(str(tmp_path)).artifact("s", {}, {}).read("nothing.bin")


@pytest.fixture(scope="module")
def s3_url():
    with s3_bucket() as url:
        yield url


def test_an_s3_store_behaves_like_a_folder(s3_url):
    store = Store(s3_url)
    store.check()
    step = store.artifact("s", {"a": 1}, {})
    assert not step.finished and step.names() == []
    step.write_json("items/one.json", [1, 2])
    with step.folder_to_publish("child") as folder:
        (folder / "config.json").write_text("{}")
    step.finish({"n": 1})
    again = Store(s3_url).artifact("s", {"a": 1}, {})
    assert again.finished and again.names("items") == ["one.json"] and again.read_json("items/one.json") == [1, 2]
    assert (again.local_folder("child") / "config.json").read_text() == "{}"


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    """The same promises hold for both."""
    root = str(tmp_path / "store") if request.param == "folder" else f"{request.getfixturevalue('s3_url')}/{tmp_path.name}"
    return Store(root)


def test_the_first_to_publish_wins(store):
    """A finished folder is never removed: whoever comes later throws its own away, before the record is written and after."""
    step = store.artifact("s", {}, {})
    for attempt in ("first", "second", "third"):
        with step.folder_to_publish("child") as folder:
            (folder / attempt).write_text(attempt)
        assert os.listdir(step.local_folder("child")) == ["first"]
    step.finish({"n": 1})
    with store.artifact("s", {}, {}).folder_to_publish("child") as folder:
        (folder / "fourth").write_text("fourth")
    assert os.listdir(step.local_folder("child")) == ["first"] and step.verify() == []
    assert [name for name in store.names(step.url) if name.startswith(".")] == []


def test_publishers_at_the_same_time(tmp_path):
    """Each in a thread, without a lease: one folder appears, whole, and nobody fails. (An object store has no rename.)"""
    store = Store(str(tmp_path))
    step, ready = store.artifact("s", {}, {}), threading.Barrier(4)

    def publish(number):
        with store.artifact("s", {}, {}).folder_to_publish("child") as folder:
            (folder / "a").write_text(str(number))
            (folder / "b").write_text(str(number))
            ready.wait(240)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(publish, range(4)))
    child = step.local_folder("child")
    assert sorted(os.listdir(child)) == ["a", "b"] and (child / "a").read_text() == (child / "b").read_text()
    step.finish({})
    assert step.verify() == []


def test_a_half_published_folder_is_not_there(s3_url):
    step = Store(f"{s3_url}/half").artifact("s", {}, {})
    step.store.filesystem.pipe_file(step.path("child/a"), b"what a process that was killed had sent")
    with pytest.raises(StoreError, match="child is missing"):
        step.local_folder("child")
    with step.folder_to_publish("child") as folder:
        (folder / "b").write_text("b")
    assert os.listdir(step.local_folder("child")) == ["b"]


def test_a_finished_artifact_is_never_changed(store):
    step = store.artifact("s", {}, {})
    step.write("a.bin", b"1")
    step.write("checkpoint", b"2")
    step.finish({"n": 1}, drop=["checkpoint", "none"])
    for change in (lambda: step.write("a.bin", b"2"), lambda: step.remove("a.bin")):
        with pytest.raises(StoreError, match="a.bin belongs to a finished artifact; these are never changed"):
            change()
    step.write("a.bin", b"1")
    step.finish({"n": 2})
    assert step.facts() == {"n": 1} and step.names() == ["a.bin", "artifact.json"]
    step.write_json("seconds.json", 1.5)
    assert step.finished and step.read_json("seconds.json") == 1.5


def test_finishing_takes_the_memory_of_a_few_pieces(tmp_path):
    """Files that another process wrote are read once, piece by piece."""
    step = Store(str(tmp_path)).artifact("s", {}, {})
    os.makedirs(step.url)
    with open(step.path("large"), "wb") as file:
        file.truncate(300 << 20)
    tracemalloc.start()
    step.finish({})
    assert step.verify() == [] and tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()
