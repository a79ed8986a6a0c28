"""Remote model folders on the local disk: fetched once per machine, found again by their content, the least recently used one goes.

A copy is `puzzle-ray-cache-<user>/<name>-<hash of the URL and of what is there>` in the temporary directory. Beside it lies a lock
file: whoever fetches locks it alone, whoever uses the copy shares the lock until its process ends. The kernel takes a dead process's
lock away. What is locked is in use and never goes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from puzzle_ray.errors import StoreError
from puzzle_ray.store import scratch

LIMIT_BYTES = 200 * 10**9  # of all copies together
_LOCK = ".lock"
_CONTENT = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")
_IN_USE: dict[Path, int] = {}  # copy -> descriptor of its lock file, shared until this process ends


def local_copy(filesystem: Any, path: str, name: str) -> Path:
    """A remote folder on the local disk; it appears whole or not at all. `name` is the readable part of the copy's name.

    Raises StoreError when it cannot be fetched or the disk has no room.
    """
    path = filesystem._strip_protocol(path).rstrip("/")
    sizes, state = {}, []
    for file, entry in sorted(filesystem.find(path, detail=True).items()):
        sizes[file.removeprefix(f"{path}/")] = int(entry.get("size") or 0)
        state.append((file, entry.get("size"), *(str(entry.get(key, "")) for key in _CONTENT)))
    address = filesystem.unstrip_protocol(path), sorted((k, repr(v)) for k, v in filesystem.storage_options.items())
    target = _folder() / f"{name}-{hashlib.sha256(repr((address, state)).encode()).hexdigest()[:16]}"
    while True:
        _use(target)
        if _is_whole(target, sizes):
            return target
        _stop_using(target)
        with _locked(target, fcntl.LOCK_EX):
            if not _is_whole(target, sizes):  # nobody was faster
                scratch.remove(target)
                _make_room(sum(sizes.values()), target)
                _fetch(filesystem, path, target)


def forget(copy: Path) -> None:
    """Removes a copy that turned out to be damaged, unless another process uses it."""
    _stop_using(copy)
    with _locked(copy, fcntl.LOCK_EX | fcntl.LOCK_NB) as locked:
        if locked:
            scratch.remove(copy)


def _folder() -> Path:
    """Nobody else's: a model is code, too."""
    folder = Path(tempfile.gettempdir()) / f"puzzle-ray-cache-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise StoreError("store", f"{folder} belongs to another user", "remove it, or set TMPDIR to a folder of your own")
    return folder


def _fetch(filesystem: Any, path: str, target: Path) -> None:
    scratch.clear_abandoned(target.parent)
    folder = scratch.scratch_beside(target)
    folder.mkdir(mode=0o700)
    try:
        filesystem.get(f"{path}/", f"{folder}/", recursive=True)
        os.rename(folder, target)
    except OSError as error:
        raise StoreError("store", f"{path} cannot be fetched to {target.parent} ({error})", "mend that, then run again") from None
    finally:
        scratch.remove(folder)


def _make_room(needed_bytes: int, target: Path) -> None:
    """Removes the least recently used copies that nobody uses, until this one fits the limit and the disk."""
    copies = [path for path in target.parent.iterdir() if path.is_dir() and not path.name.startswith(".") and path != target]
    copies.sort(key=lambda path: _lock_file(path).stat().st_mtime if _lock_file(path).exists() else 0.0)
    total = {path: sum(file.lstat().st_size for file in path.rglob("*") if file.is_file()) for path in copies}
    for path in copies:
        fits_limit = sum(total.values()) + needed_bytes <= LIMIT_BYTES
        if fits_limit and shutil.disk_usage(target.parent).free >= needed_bytes:
            return
        with _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as locked:
            if locked:
                scratch.remove(path)
                del total[path]
                _lock_file(path).unlink(missing_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed_bytes:
        problem = f"{target.parent} has {free / 1e9:.1f} GB free, and {target.name} needs {needed_bytes / 1e9:.1f} GB"
        raise StoreError("store", problem, "free some space, or set TMPDIR to a larger disk")


def _is_whole(target: Path, sizes: dict[str, int]) -> bool:
    """Cleaners of temporary directories remove single files."""
    return target.is_dir() and all((target / n).is_file() and (target / n).stat().st_size == size for n, size in sizes.items())


def _lock_file(target: Path) -> Path:
    return target.with_name(f".{target.name}{_LOCK}")


@contextmanager
def _locked(target: Path, how: int) -> Iterator[bool]:
    """Holds a copy's lock; with LOCK_NB says whether it does."""
    descriptor = _lock(target, how)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(target: Path, how: int) -> int | None:
    """The descriptor of the locked lock file; None where LOCK_NB finds it locked."""
    while True:
        descriptor = os.open(_lock_file(target), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, how)
            if os.path.exists(_lock_file(target)) and os.path.samestat(os.fstat(descriptor), os.stat(_lock_file(target))):
                return descriptor
            os.close(descriptor)  # it was removed while we waited: lock the new one
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise


def _use(target: Path) -> None:
    if target not in _IN_USE:
        descriptor = _lock(target, fcntl.LOCK_SH)
        assert descriptor is not None
        _IN_USE[target] = descriptor
    os.utime(_IN_USE[target])


def _stop_using(target: Path) -> None:
    if target in _IN_USE:
        os.close(_IN_USE.pop(target))
