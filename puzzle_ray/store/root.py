"""The folder or URL under which everything is kept, and listing, hashing and fetching what lies there."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from puzzle_ray.errors import StoreError
from puzzle_ray.store import scratch

LOGS = "log"  # the folder of a store that holds the logs of runs, a folder each
_CHUNK_BYTES = 8 << 20


class Root:
    """A path or any fsspec URL. Opening one touches nothing; `check` proves that it can be written."""

    def __init__(self, root: str) -> None:
        protocol, separator, path = root.partition("://")
        if separator and not path.strip("/"):  # a bucket's name that is empty
            raise StoreError(
                "store", f"{root!r} names nothing behind its protocol", f"write {protocol}://BUCKET/FOLDER, or a folder"
            )
        self.root = root.rstrip("/") if separator else str(Path(root).expanduser().absolute())

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
        try:
            self.filesystem.makedirs(self.root, exist_ok=True)
            if self.is_local:
                scratch.clear_abandoned(Path(self.root))
            probe = str(scratch.scratch_beside(Path("probe"))) if self.is_local else f".probe-{uuid.uuid4().hex}"
            self.filesystem.pipe_file(f"{self.root}/{probe}", b"ok")
            self.filesystem.rm_file(f"{self.root}/{probe}")
        except Exception as error:  # every backend has errors of its own
            reason = f"{type(error).__name__}: {error}"
            raise StoreError("store", f"{self.root!r} cannot be written ({reason})", "name a writable folder or URL") from None

    def names(self, path: str) -> list[str]:
        """What lies directly in a folder, hidden or not."""
        try:
            found = self.filesystem.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        base = path.rstrip("/").rsplit("/", 1)[-1]
        names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in found)
        return sorted(name for name in names if name and name != base)

    def sizes(self, path: str) -> dict[str, int]:
        """Bytes of every file in a folder and below it, by its path inside; hidden files and folders too."""
        if self.is_local:
            return dict(_local_sizes(Path(path)))
        base = self.filesystem._strip_protocol(path).rstrip("/") + "/"
        found = self.filesystem.find(path, detail=True)
        return {name.removeprefix(base): int(entry["size"]) for name, entry in found.items() if name.startswith(base)}

    def checksum(self, path: str) -> str:
        """SHA-256 of a file, read piece by piece. Raises OSError."""
        with self.filesystem.open(path, "rb") as file:
            return checksum_of(file)


def checksum_of(file: Any) -> str:
    """SHA-256 of what is left in an open file; holds a few MiB of it at a time."""
    digest = hashlib.sha256()
    while piece := file.read(_CHUNK_BYTES):
        digest.update(piece)
    return digest.hexdigest()


def is_hidden(name: str) -> bool:
    """Whether a path inside an artifact, or a folder on the way to it, begins with a dot."""
    return any(part.startswith(".") for part in name.split("/"))


def _local_sizes(folder: Path) -> Iterator[tuple[str, int]]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            try:
                yield path.relative_to(folder).as_posix(), path.stat().st_size
            except FileNotFoundError:  # removed meanwhile
                continue
