"""Comparing files with what was written: checksums that this process knows already, and forms that a look can tell to be broken."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from puzzle_ray.errors import StoreError
from puzzle_ray.store import scratch
from puzzle_ray.store.record import FileEntry
from puzzle_ray.store.root import Root, checksum_of

if TYPE_CHECKING:
    from torch import Tensor

_REQUESTS_AT_ONCE = 8
OTHER_CHECKSUM = "is damaged (its checksum is not the one that was written)"
_KNOWN: dict[str, tuple[FileEntry, tuple[int, int]]] = {}  # local path -> what was seen there, and the file's size and time then
Item = TypeVar("Item")
Found = TypeVar("Found")


def unwritten(target: str | Path, error: Exception) -> StoreError:
    """The error to raise."""
    return StoreError("store", f"{target} cannot be written ({error})", "free some space, then run the same command")


@contextmanager
def tensors_beside(target: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Iterator[tuple[Path, FileEntry]]:
    """A safetensors file beside `target`, to be put in its place, and its size and checksum. It is never whole in memory."""
    from safetensors import SafetensorError  # what a full disk is
    from safetensors.torch import save_file

    with scratch.filling(target) as file:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            mode = file.stat().st_mode
            save_file(dict(tensors), file, metadata=metadata)
            if len(metadata) > 1:
                with file.open("rb+") as made:
                    _order_metadata(made)
            if file.stat().st_mode != mode:  # safetensors lets nobody else read it
                file.chmod(mode)
            with file.open("rb") as written:
                entry = FileEntry(file.stat().st_size, checksum_of(written))
        except (OSError, SafetensorError) as error:
            raise unwritten(target, error) from None
        yield file, entry


def tensors_as_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The same file in memory."""
    from safetensors.torch import save

    data = save(dict(tensors), metadata=metadata)
    if len(metadata) < 2:
        return data
    made = io.BytesIO(data)
    _order_metadata(made)
    return made.getvalue()


def _order_metadata(file: BinaryIO) -> None:
    """Writes the metadata of a safetensors file by name: safetensors has them in another order every time, and equal content is to be
    equal to the byte."""
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    ordered = header | {"__metadata__": dict(sorted(header["__metadata__"].items()))}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) <= size:  # as it is, where both write JSON alike
        file.seek(8)
        file.write(text.ljust(size))


class Checked:
    """What this process has written or compared. A local file is read again when its size or time changed; a remote one always."""

    def __init__(self, root: Root) -> None:
        self.root = root

    def wrote(self, path: str, entry: FileEntry) -> None:
        if self.root.is_local:
            _know(Path(path), entry)

    def problem_of(self, path: str, entry: FileEntry, data: bytes) -> str | None:
        """What is wrong with data that were read from `path`."""
        if len(data) != entry.bytes:
            return f"is damaged ({len(data)} bytes, {entry.bytes} were written)"
        if self.root.is_local and _is_known(Path(path), entry):
            return None
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            return OTHER_CHECKSUM
        self.wrote(path, entry)
        return None

    def problem_of_file(self, path: Path, entry: FileEntry) -> str | None:
        """What is wrong with a file on the local disk, read piece by piece."""
        try:
            if path.stat().st_size != entry.bytes:
                return f"is damaged ({path.stat().st_size} bytes, {entry.bytes} were written)"
            if _is_known(path, entry):
                return None
            with path.open("rb") as file:
                if checksum_of(file) != entry.sha256:
                    return OTHER_CHECKSUM
        except FileNotFoundError:
            return "is missing"
        _know(path, entry)
        return None

    def entries(self, names: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, FileEntry]:
        """Size and checksum by name, of files given as path -> name; files that this process did not write are read once."""

        def entry_of(path: str) -> FileEntry:
            known = _KNOWN.get(path) if self.root.is_local else None
            if known and _is_known(Path(path), known[0]):
                return known[0]
            return FileEntry(sizes[names[path]], self.root.checksum(path))

        return {names[path]: entry for path, entry in zip(names, for_each(self.root, entry_of, names), strict=True)}


def for_each(root: Root, function: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
    """Calls the function for every item, such as a path: one by one on a disk, several at once on a remote store."""
    if root.is_local:
        return [function(item) for item in items]
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(function, items))


def looks_broken(root: Root, path: str, size: int) -> bool:
    """Whether a file is empty, or no whole JSON, safetensors or parquet file although its name says that it is one."""
    if not size:
        return True
    try:
        with root.filesystem.open(path, "rb") as file:
            if path.endswith(".json"):
                json.loads(file.read())
            elif path.endswith(".safetensors"):
                length = int.from_bytes(file.read(8), "little")
                if length > size:
                    return True
                header = json.loads(file.read(length))
                ends = (tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")
                return bool(size != 8 + length + max(ends, default=0))
            elif path.endswith(".parquet"):
                head = file.read(4)
                file.seek(max(0, size - 4))
                return head + file.read(4) != b"PAR1PAR1"
    except FileNotFoundError:  # removed meanwhile
        return False
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return True
    return False


def _state(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _know(path: Path, entry: FileEntry) -> None:
    try:
        _KNOWN[str(path)] = entry, _state(path)
    except FileNotFoundError:  # removed meanwhile
        _KNOWN.pop(str(path), None)


def _is_known(path: Path, entry: FileEntry) -> bool:
    try:
        return _KNOWN.get(str(path)) == (entry, _state(path))
    except FileNotFoundError:
        return False
