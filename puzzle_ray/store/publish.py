"""A folder that appears as a whole: by one rename in a local store, by a list of its files written last on an object store."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from puzzle_ray.errors import StoreError
from puzzle_ray.store import scratch
from puzzle_ray.store.record import FileEntry, Record, entries_from_json, entries_to_json, problems_of
from puzzle_ray.store.root import Root, checksum_of

_ENDING = ".published"


def list_name(name: str) -> str:
    """The hidden file, beside a published folder of an unfinished artifact, that lists what is in it."""
    return f".{name}{_ENDING}"


def published(root: Root, url: str) -> dict[str, dict[str, FileEntry]]:
    """Folders that were published in an unfinished artifact, and their files by the path in the artifact."""
    found = {}
    for hidden in root.names(url):
        if hidden.startswith(".") and hidden.endswith(_ENDING):
            name = hidden[1 : -len(_ENDING)]
            entries = entries_from_json(bytes(root.filesystem.cat_file(f"{url}/{hidden}")))
            if entries is not None:
                found[name] = {f"{name}/{file}": entry for file, entry in entries.items()}
    return found


def list_again(root: Root, url: str, record: Record, gone: set[str]) -> None:
    """Readies a finished artifact to be an unfinished one: the published folders that stay have their lists beside them again."""
    for name in record.published:
        if name not in gone:
            files = {file.removeprefix(f"{name}/"): e for file, e in record.files.items() if file.startswith(f"{name}/")}
            root.filesystem.pipe_file(f"{url}/{list_name(name)}", entries_to_json(files))


@contextmanager
def folder_to_publish(root: Root, url: str, name: str, may_publish: Callable[[], bool]) -> Iterator[Path]:
    """See `Artifact.folder_to_publish`. `may_publish` is asked when the folder is full; without leave it is thrown away."""
    if root.is_local:
        target = Path(url, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.clear_abandoned(target.parent)
        folder = scratch.scratch_beside(target)
        folder.mkdir(mode=0o700)
    else:
        folder = Path(tempfile.mkdtemp(prefix="puzzle-ray-"))
    from safetensors import SafetensorError  # what a full disk is when weights are written

    try:
        yield folder
        if may_publish():
            (_rename if root.is_local else _upload)(root, url, name, folder, entries_of(folder))
    except (OSError, SafetensorError) as error:
        raise StoreError("store", f"{url}/{name} cannot be written ({error})", "free some space and run again") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_complete(root: Root, url: str, name: str) -> bool:
    """Whether the folder is there and has all files that its list names."""
    listed = published(root, url).get(name)
    return listed is not None and not problems_of(listed, {f"{name}/{k}": v for k, v in root.sizes(f"{url}/{name}").items()})


def _rename(root: Root, url: str, name: str, folder: Path, files: dict[str, FileEntry]) -> None:
    """The first one to publish wins: a folder that is there, and is all it was, stays."""
    folder.chmod(0o755)
    target, listed = Path(url, name), Path(url, list_name(name))
    if target.is_dir() and listed.exists() and not is_complete(root, url, name):
        os.rename(target, aside := scratch.scratch_beside(target))
        scratch.remove(aside)
    try:
        os.rename(folder, target)
    except OSError:
        if not (target.is_dir() and any(target.iterdir())):
            raise
        if listed.exists():
            return
        files = entries_of(target)
    scratch.write_atomically(listed, entries_to_json(files))


def _upload(root: Root, url: str, name: str, folder: Path, files: dict[str, FileEntry]) -> None:
    if is_complete(root, url, name):
        return
    if root.filesystem.exists(f"{url}/{list_name(name)}"):
        root.filesystem.rm_file(f"{url}/{list_name(name)}")
    if root.filesystem.exists(f"{url}/{name}"):  # what a process that died had sent
        root.filesystem.rm(f"{url}/{name}", recursive=True)
    root.filesystem.put(f"{folder}/", f"{url}/{name}/", recursive=True)
    root.filesystem.pipe_file(f"{url}/{list_name(name)}", entries_to_json(files))


def entries_of(folder: Path) -> dict[str, FileEntry]:
    """Size and checksum of every file in a local folder and below it."""
    found = {}
    for name, size in sorted(Root(str(folder)).sizes(str(folder)).items()):
        with (folder / name).open("rb") as file:
            found[name] = FileEntry(size, checksum_of(file))
    return found
