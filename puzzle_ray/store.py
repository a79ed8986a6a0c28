"""Where artifacts live: one folder per stage run under a root that is a path or any fsspec URL.

A stage's key is a hash of its name, its settings, the keys of what it read and the schema version, and names its folder:
`<root>/<stage>-<key>`. Files inside appear complete or not at all; the record `artifact.json` is written last, so a folder that
has one is finished. Items written before it (one file each) are what a resumed stage does not do again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle_ray.errors import StoreError

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 2
RECORD = "artifact.json"
_ABANDONED_AFTER_S = 24 * 3600.0  # scratch of another machine's or container's process, since it was last written to


def content_key(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Twelve hex digits that depend on everything the stage depends on. Raises TypeError for what has no stable JSON form."""
    text = json.dumps([stage, settings, inputs, SCHEMA_VERSION], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Store:
    """A root under which steps are kept. Opening one touches nothing; `check` proves that it can be written."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/") if "://" in root else str(Path(root).expanduser().absolute())

    @cached_property
    def filesystem(self) -> Any:
        import fsspec

        try:
            # other processes write here too: a listing must never be remembered
            return fsspec.core.url_to_fs(self.root, use_listings_cache=False, skip_instance_cache=True)[0]
        except (ValueError, ImportError) as error:
            raise StoreError("store", f"{self.root!r} cannot be opened ({error})", "name a folder or an fsspec URL") from None

    @property
    def is_local(self) -> bool:
        return "://" not in self.root

    def check(self) -> None:
        """Writes and removes a small file. Raises StoreError when that fails."""
        probe = f"{self.root}/.probe-{uuid.uuid4().hex}"
        try:
            self.filesystem.makedirs(self.root, exist_ok=True)
            self.filesystem.pipe_file(probe, b"ok")
            self.filesystem.rm_file(probe)
        except Exception as error:  # every backend has errors of its own
            reason = f"{type(error).__name__}: {error}"
            raise StoreError("store", f"{self.root!r} cannot be written ({reason})", "name a writable folder or URL") from None

    def artifact(self, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> Artifact:
        """The folder of one stage run, finished or not."""
        return Artifact(self, stage, content_key(stage, settings, inputs), dict(settings), dict(inputs))


class Artifact:
    """One stage run's folder."""

    def __init__(self, store: Store, stage: str, key: str, settings: dict[str, Any], inputs: dict[str, str]) -> None:
        self.store, self.stage, self.key, self.settings, self.inputs = store, stage, key, settings, inputs

    @property
    def url(self) -> str:
        return f"{self.store.root}/{self.stage}-{self.key}"

    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    @property
    def finished(self) -> bool:
        return self.exists(RECORD)

    def exists(self, name: str) -> bool:
        return bool(self.store.filesystem.exists(self.path(name)))

    def names(self, folder: str = "") -> list[str]:
        """File names directly inside the step's folder (or a folder in it), hidden ones left out."""
        base = self.path(folder) if folder else self.url
        if not self.store.filesystem.isdir(base):
            return []
        names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in self.store.filesystem.ls(base, detail=False))
        return sorted(name for name in names if not name.startswith("."))

    def write(self, name: str, data: bytes) -> None:
        """Atomic. Raises StoreError when it cannot be written (a full disk, say); an older file then still stands."""
        target = self.path(name)
        try:
            self.store.filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            if self.store.is_local:
                _write_atomically(Path(target), data)
            else:  # an object appears when its upload is complete
                self.store.filesystem.pipe_file(target, data)
        except OSError as error:
            raise StoreError(
                "store", f"{target} cannot be written ({error})", "free some space, then run the same command"
            ) from None

    def read(self, name: str) -> bytes:
        """Raises StoreError when there is no such file."""
        try:
            return bytes(self.store.filesystem.cat_file(self.path(name)))
        except FileNotFoundError:
            raise StoreError("store", f"{self.path(name)} is missing", "run the stage that makes it again") from None

    def write_json(self, name: str, value: object) -> None:
        self.write(name, json.dumps(value, indent=1).encode())

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        """One safetensors file."""
        from safetensors.torch import save

        self.write(name, save({k: v.contiguous() for k, v in tensors.items()}, metadata=dict(metadata or {})))

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors of a safetensors file and its metadata."""
        from safetensors.torch import load

        data = self.read(name)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return load(data), header.get("__metadata__", {})

    def remove(self, name: str) -> None:
        """Forgets a file, if it is there."""
        if self.exists(name):
            self.store.filesystem.rm(self.path(name), recursive=True)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Writes the record: from now on the step is complete. Scratch of processes that were killed is cleared away."""
        if self.store.is_local:
            for folder in (Path(self.url), *(path for path in Path(self.url).glob("*/") if path.is_dir())):
                clear_abandoned(folder)
        record = {
            "stage": self.stage,
            "key": self.key,
            "schema": SCHEMA_VERSION,
            "settings": self.settings,
            "inputs": self.inputs,
        }
        self.write_json(RECORD, record | {"facts": dict(facts)})

    def facts(self) -> dict[str, Any]:
        """What the finished step recorded about itself."""
        return dict(self.read_json(RECORD)["facts"])

    @contextmanager
    def folder_to_publish(self, name: str) -> Iterator[Path]:
        """A local folder to fill; it appears as `name` when the block ends without an error, whole (local) or file by file.

        What processes that were killed left behind while they did the same is cleared away.
        """
        if self.store.is_local:
            target = Path(self.path(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            clear_abandoned(target.parent)
            scratch = _scratch(target)
            scratch.mkdir(mode=0o700)
        else:
            scratch = Path(tempfile.mkdtemp(prefix="puzzle-ray-"))
        from safetensors import SafetensorError  # what a full disk is when weights are written

        try:
            yield scratch
            if self.store.is_local:
                scratch.chmod(0o755)
                shutil.rmtree(target, ignore_errors=True)
                os.replace(scratch, target)
            else:
                self.store.filesystem.put(f"{scratch}/", self.path(name) + "/", recursive=True)
        except (OSError, SafetensorError) as error:
            raise StoreError("store", f"{self.path(name)} cannot be written ({error})", "free some space and run again") from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def local_folder(self, name: str) -> Path:
        """A folder of this step on the local disk: itself, or a copy kept in the temporary directory. Raises StoreError."""
        if not self.store.filesystem.isdir(self.path(name)):
            raise StoreError("store", f"{self.path(name)} is missing", "run the stage that makes it again")
        if self.store.is_local:
            return Path(self.path(name))
        return local_copy(self.store.filesystem, self.path(name), f"{self.stage}-{self.key}-{name}")


def local_copy(filesystem: Any, path: str, name: str) -> Path:
    """A remote folder on the local disk, fetched once and kept in the temporary directory; it appears whole or not at all."""
    target = Path(tempfile.gettempdir()) / f"puzzle-ray-cache-{os.getuid()}" / name
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
        filesystem.get(path.rstrip("/") + "/", f"{scratch}/", recursive=True)
        try:
            os.replace(scratch, target)
        except OSError:  # another process was faster; its copy is the same
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _scratch(target: Path) -> Path:
    """A hidden path beside `target` that tells which process of which machine writes there."""
    return target.parent / f".{target.name}~{_process_space()}~{os.getpid()}~{uuid.uuid4().hex}"


@cache
def _process_space() -> str:
    """Within which a process id means one process. A host name does not tell: containers and cloned machines may share one."""
    try:
        words = Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        words = socket.gethostname(), f"{uuid.getnode():x}"
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def clear_abandoned(folder: Path) -> None:
    """Removes scratch in `folder` whose process is dead; where that cannot be seen, when nobody has written to it for a day."""
    for path in folder.glob(".*~*~*~*"):
        if _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    _, space, pid, _ = path.name.rsplit("~", 3)
    try:
        if space == _process_space() and pid.isdigit():
            return not _is_running(int(pid))
        written = max(file.lstat().st_mtime for file in (path, *path.rglob("*")))
        return time.time() - written > _ABANDONED_AFTER_S
    except FileNotFoundError:  # published or removed meanwhile
        return False


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write_atomically(target: Path, data: bytes) -> None:
    scratch = _scratch(target)
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)
