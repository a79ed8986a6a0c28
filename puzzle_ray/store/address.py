"""From a path or URL back to the artifact that it lies in, so that whoever is handed a folder by its address can verify it."""

from __future__ import annotations

import re
from pathlib import Path

from puzzle_ray.store.artifact import Artifact, Store

NAME = re.compile("[A-Za-z0-9_][A-Za-z0-9_.-]*-[0-9a-f]{12}")  # of an artifact's folder


def artifact_in(store: Store, name: str) -> Artifact:
    """The artifact of a folder's name, which must fit `NAME`. What it was made from is known to its record alone."""
    stage, _, key = name.rpartition("-")
    return Artifact(store, stage, key, {}, {})


def artifact_at(address: str) -> tuple[Artifact, str] | None:
    """The artifact that a path or URL lies in, and what is left of the address behind its folder. None for any other address."""
    remote = "://" in address
    parts = (address.rstrip("/") if remote else str(Path(address).expanduser().absolute())).split("/")
    for n in range(len(parts) - 1, 2 if remote else 0, -1):  # a bucket is no artifact
        if NAME.fullmatch(parts[n]):
            return artifact_in(Store("/".join(parts[:n]) or "/"), parts[n]), "/".join(parts[n + 1 :])
    return None


def verified_folder(address: str) -> Path | None:
    """A folder of a finished artifact on the local disk, each of its files as it was written. None for any other address.

    Raises Damaged where a file, or the artifact's record, is not as it was written. An artifact of another schema has no checksums
    that could be compared.
    """
    found = artifact_at(address)
    if found is None or not found[1]:
        return None
    artifact, name = found
    record = artifact.record()
    if record is None:
        artifact.check_record()
        return None
    return artifact.local_folder(name) if any(file.startswith(f"{name}/") for file in record.files) else None
