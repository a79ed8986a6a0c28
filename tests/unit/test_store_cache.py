"""Remote models on the local disk: fetched once per machine, by content, within a bound."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import fsspec
import pytest
from s3_server import s3_bucket

from puzzle_ray.errors import Damaged, StoreError
from puzzle_ray.store import Store, cache, local_copy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def s3_url():
    with s3_bucket() as url:
        yield url


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A temporary directory of the test's own, which processes that it starts have, too."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield tmp_path
    for copy in list(cache._IN_USE):
        cache._stop_using(copy)


@pytest.fixture
def remote(s3_url, tmp_path):
    """(filesystem, path) of a folder with one file, `weights`."""
    filesystem, path = fsspec.core.url_to_fs(
        f"{s3_url}/{tmp_path.name}/model", use_listings_cache=False, skip_instance_cache=True
    )
    filesystem.pipe_file(f"{path}/weights", b"first")
    return filesystem, path


def copies(temporary):
    (folder,) = temporary.glob("puzzle-ray-cache-*")
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_content_and_store_name_a_copy(remote, s3_url, temporary):
    filesystem, path = remote
    first = local_copy(filesystem, path, "m")
    assert local_copy(filesystem, path + "/", "m") == first and (first / "weights").read_bytes() == b"first"
    filesystem.pipe_file(f"{path}/weights", b"later")  # as many bytes
    second = local_copy(filesystem, path, "m")
    assert second != first and (second / "weights").read_bytes() == b"later"
    filesystem.pipe_file(f"{path}-b/weights", b"later")
    assert local_copy(filesystem, f"{path}-b", "m") not in (first, second)
    assert len(copies(temporary)) == 3 and os.stat(first.parent).st_mode & 0o77 == 0


def test_the_same_key_in_two_stores_is_two_copies(s3_url, temporary):
    for name in ("one", "two"):
        step = Store(f"{s3_url}/{temporary.name}-{name}").artifact("child", {}, {})
        with step.folder_to_publish("child") as folder:
            (folder / "weights").write_text(name)
        step.finish({})
        assert (step.local_folder("child") / "weights").read_text() == name


FETCH = """
import sys, fsspec
from puzzle_ray.store import local_copy
filesystem, path = fsspec.core.url_to_fs(sys.argv[1], use_listings_cache=False, skip_instance_cache=True)
get = filesystem.get
def counted(*args, **options):
    open(sys.argv[2], "a").write("fetched\\n")
    import time; time.sleep(0.5)
    if sys.argv[3] == "die":
        import os, signal; os.kill(os.getpid(), signal.SIGKILL)
    get(*args, **options)
filesystem.get = counted
print(local_copy(filesystem, path, "m"))
"""


def test_processes_at_once_fetch_once_and_a_dead_one_is_replaced(remote, temporary):
    log, url = temporary / "log", "s3://" + remote[1]

    def fetching(how):
        command = [sys.executable, "-c", FETCH, url, str(log), how]
        return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)

    assert fetching("die").wait(240) == -9 and log.read_text() == "fetched\n"
    processes = [fetching("live") for _ in range(3)]
    found = {process.communicate(timeout=240)[0] for process in processes}
    assert len(found) == 1 and log.read_text() == "fetched\n" * 2
    assert [path for path in Path(found.pop().strip()).parent.iterdir() if "~" in path.name] == []


def test_the_least_recently_used_goes_and_what_is_in_use_stays(remote, temporary, monkeypatch):
    filesystem, path = remote
    monkeypatch.setattr(cache, "LIMIT_BYTES", 250)
    made = {}
    for name in ("a", "b"):
        filesystem.pipe_file(f"{path}-{name}/weights", bytes(100))
        made[name] = local_copy(filesystem, f"{path}-{name}", name)
        cache._stop_using(made[name])  # as when its process has ended
        os.utime(cache._lock_file(made[name]), (len(made), len(made)))
    filesystem.pipe_file(f"{path}-c/weights", bytes(100))
    made["c"] = local_copy(filesystem, f"{path}-c", "c")
    assert [name[0] for name in copies(temporary)] == ["b", "c"]
    local_copy(filesystem, f"{path}-b", "b")
    filesystem.pipe_file(f"{path}-d/weights", bytes(100))
    local_copy(filesystem, f"{path}-d", "d")
    assert [name[0] for name in copies(temporary)] == ["b", "c", "d"], "b and c are in use"


def test_a_full_disk_is_said_before_it_is_full(remote, temporary, monkeypatch):
    usage = shutil.disk_usage(temporary)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3))
    with pytest.raises(StoreError, match=r"has 0.0 GB free, and m-\w+ needs 0.0 GB; free some space, or set TMPDIR"):
        local_copy(*remote, "m")


def test_files_that_a_cleaner_removed_are_fetched_again(remote, temporary):
    copy = local_copy(*remote, "m")
    (copy / "weights").unlink()
    assert local_copy(*remote, "m") == copy and (copy / "weights").read_bytes() == b"first"


def test_a_copy_of_an_artifact_is_compared_with_its_record(s3_url, temporary):
    step = Store(f"{s3_url}/{temporary.name}").artifact("child", {}, {})
    with step.folder_to_publish("child") as folder:
        (folder / "weights").write_text("right")
    step.finish({})
    copy = step.local_folder("child")
    (copy / "weights").write_text("wrong")
    assert step.local_folder("child") == copy and (copy / "weights").read_text() == "right", "fetched again"
    step.store.filesystem.pipe_file(step.path("child/weights"), b"wrong")
    with pytest.raises(Damaged, match="child/weights is damaged"):
        step.local_folder("child")
