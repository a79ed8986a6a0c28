"""Files on their way: hidden names that tell which process of which machine writes there, and clearing up after dead ones."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

ABANDONED_AFTER_S = 24 * 3600.0  # scratch of another machine's or container's process, since it was last written to
_SAME_START_S = 2.0  # a process's start time is read to about a second


def scratch_beside(target: Path) -> Path:
    """A hidden path beside `target` that tells which process of which machine writes there."""
    return target.parent / f".{target.name}~{process_space()}~{os.getpid()}~{uuid.uuid4().hex}"


@cache
def process_space() -> str:
    """Within which a process id means one process. A host name does not tell: containers and cloned machines may share one."""
    try:
        words = Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        words = socket.gethostname(), f"{uuid.getnode():x}"
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def process_start(pid: int) -> float | None:
    """When a process of this machine started, in seconds since 1970. None when it is gone; a zombie is gone."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.AccessDenied:
        return 0.0
    except psutil.NoSuchProcess:
        return None


def is_running(pid: int, started: float | None = None) -> bool:
    """Whether process `pid` of this machine runs; with `started`, whether it is still the one that started then."""
    start = process_start(pid)
    return start is not None and (started is None or not start or abs(start - started) < _SAME_START_S)


def clear_abandoned(folder: Path) -> None:
    """Removes scratch in `folder` whose process is dead; where that cannot be seen, when nobody has written to it for a day."""
    for path in folder.glob(".*~*~*~*"):
        if is_abandoned(path):
            remove(path)


def is_abandoned(path: Path) -> bool:
    _, space, pid, _ = path.name.rsplit("~", 3)
    try:
        if space == process_space() and pid.isdigit():
            return not is_running(int(pid))
        written = max(file.lstat().st_mtime for file in (path, *path.rglob("*")))
        return time.time() - written > ABANDONED_AFTER_S
    except FileNotFoundError:  # published or removed meanwhile
        return False


def remove(path: Path) -> None:
    """A file or a folder; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def filling(target: Path) -> Iterator[Path]:
    """A path beside `target` to write a file to, for `put` to put in its place; gone after the block."""
    scratch = scratch_beside(target)
    try:
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)


def put(scratch: Path, target: Path) -> None:
    """A file that is written whole takes the place of the old one."""
    with scratch.open("r+b") as file:
        os.fsync(file.fileno())
    os.replace(scratch, target)


def write_atomically(target: Path, data: bytes) -> None:
    """The file is there whole, or the old one still stands."""
    with filling(target) as scratch:
        scratch.write_bytes(data)
        put(scratch, target)
