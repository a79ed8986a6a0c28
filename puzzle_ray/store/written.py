"""What was written to an artifact that has no record yet: size and SHA-256 of every item, in a small file of its own.

The small file is written first and names what the item may be: the new content, and what was there before it. So whoever is killed
between the two leaves an item that agrees with it. The record takes their place when the artifact is finished.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path

from puzzle_ray.store import scratch
from puzzle_ray.store.files import OTHER_CHECKSUM, Checked, for_each
from puzzle_ray.store.record import FileEntry, Problem
from puzzle_ray.store.root import Root, is_hidden

FOLDER = ".written"


class Written:
    """The items of one artifact, as they were written."""

    def __init__(self, root: Root, url: str, checked: Checked) -> None:
        self._root, self._url, self._checked = root, url, checked
        self._now: dict[str, tuple[FileEntry, ...]] = {}  # by this process

    def about_to(self, name: str, entry: FileEntry) -> None:
        """The item may be this from now on. Raises OSError."""
        before = self._now[name] if name in self._now else self.of(name) or ()
        self._now[name] = (entry, *(other for other in before if other != entry))
        self._keep(name, self._now[name])

    def done(self, name: str, entry: FileEntry) -> None:
        """The item is this now."""
        self._now[name] = (entry,)

    def forget(self, name: str) -> None:
        """The item, or the folder of items, is gone."""
        for item in [item for item in self._now if item == name or item.startswith(f"{name}/")]:
            del self._now[item]
        if self._root.filesystem.exists(self._path(name)):
            self._root.filesystem.rm(self._path(name), recursive=True)

    def forget_all(self) -> None:
        self._now = {}
        if self._root.filesystem.exists(f"{self._url}/{FOLDER}"):
            self._root.filesystem.rm(f"{self._url}/{FOLDER}", recursive=True)

    def list_again(self, files: Mapping[str, FileEntry]) -> None:
        """Readies a finished artifact to be an unfinished one."""
        for_each(self._root, lambda name: self._keep(name, (files[name],)), files)

    def of(self, name: str) -> tuple[FileEntry, ...] | None:
        """What the item may be. None where nothing is known of it; nothing where what was known is damaged."""
        try:
            data = bytes(self._root.filesystem.cat_file(self._path(name)))
        except FileNotFoundError:
            return None
        try:
            return tuple(FileEntry(int(size), str(sha)) for size, sha in json.loads(data))
        except (ValueError, TypeError):
            return ()

    def names(self, sizes: Mapping[str, int]) -> list[str]:
        """The items of which something is known, among all files of the artifact."""
        there = (name.removeprefix(f"{FOLDER}/") for name in sizes if name.startswith(f"{FOLDER}/"))
        return [name for name in there if name in sizes and not is_hidden(name)]

    def problem_of(self, name: str, data: bytes) -> str | None:
        """What is wrong with data that were read as this item."""
        entries = self.of(name)
        if entries is None or any(self._checked.problem_of(f"{self._url}/{name}", entry, data) is None for entry in entries):
            return None
        return OTHER_CHECKSUM

    def problems(self, names: list[str]) -> list[Problem]:
        """Reads these items and says which are not what was written."""
        found = for_each(self._root, self._problem_on_disk, names)
        return [Problem(name, OTHER_CHECKSUM) for name, is_damaged in zip(names, found, strict=True) if is_damaged]

    def entries(self, names: list[str], sizes: Mapping[str, int]) -> tuple[dict[str, FileEntry], list[Problem]]:
        """Size and checksum of these items as they were written, and what is wrong with them. An item is read where its size does not
        tell which of several contents it has."""
        found, problems = {}, []
        for name, known in zip(
            names, for_each(self._root, lambda name: self._now.get(name) or self.of(name), names), strict=True
        ):
            likely = [entry for entry in known or () if entry.bytes == sizes[name]]
            if len(likely) > 1:
                sha256 = self._root.checksum(f"{self._url}/{name}")
                likely = [entry for entry in likely if entry.sha256 == sha256]
            if likely:
                found[name] = likely[0]
            else:
                problems.append(Problem(name, OTHER_CHECKSUM))
        return found, problems

    def _problem_on_disk(self, name: str) -> bool:
        try:
            sha256 = self._root.checksum(f"{self._url}/{name}")
        except FileNotFoundError:  # removed meanwhile
            return False
        entries = self.of(name)  # read afterwards: another process may be writing
        if entries is None:
            return False
        same = [entry for entry in entries if entry.sha256 == sha256]
        if same:
            self._checked.wrote(f"{self._url}/{name}", same[0])
        return not same

    def _keep(self, name: str, entries: tuple[FileEntry, ...]) -> None:
        path, data = self._path(name), json.dumps([astuple(entry) for entry in entries]).encode()
        self._root.filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        if self._root.is_local:
            scratch.write_atomically(Path(path), data)
        else:
            self._root.filesystem.pipe_file(path, data)

    def _path(self, name: str) -> str:
        return f"{self._url}/{FOLDER}/{name}"
