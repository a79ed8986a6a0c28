"""The record of a finished artifact: what it was made from, and size and SHA-256 of every file; and what is wrong with the files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 6  # part of every key: it rises when records, or what a stage computes from the same settings and inputs, change
RECORD = "artifact.json"
DAMAGE_SEEN = ".damaged"  # a reader found a file damaged; says which
UNREADABLE, OTHER_VERSION = "cannot be read", "was written by"  # what may be wrong with a record
State = Literal["absent", "unfinished", "finished", "damaged"]


def content_key(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Twelve hex digits that depend on everything the stage depends on. Raises TypeError for what has no stable JSON form."""
    text = json.dumps([stage, settings, inputs, SCHEMA_VERSION], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class FileEntry:
    """A file as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Problem:
    """A file of an artifact that is not as it was written."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file} {self.what}"


@dataclass(frozen=True)
class Record:
    """`published`: folders that appeared as wholes, and are made again as wholes. `finished_at`: UTC.

    `seconds`: since the run that finished it began to work on it; None where no run had taken it.
    """

    stage: str
    key: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    facts: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    published: tuple[str, ...] = ()
    finished_at: str = ""
    seconds: float | None = None
    schema: int = field(default=SCHEMA_VERSION)

    def to_json(self) -> bytes:
        fields = asdict(self)
        return json.dumps(fields | {"sha256": _sum_of(fields)}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Record | None:
        """None for what is no whole record of this schema."""
        try:
            fields = json.loads(data)
            expected = fields.pop("sha256")
            if fields["schema"] != SCHEMA_VERSION or expected != _sum_of(fields):
                return None
            files = {name: FileEntry(**entry) for name, entry in fields.pop("files").items()}
            return cls(files=files, published=tuple(fields.pop("published")), **fields)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def missing_or_changed(self, sizes: Mapping[str, int]) -> list[Problem]:
        """What the sizes of the files that are there tell."""
        return problems_of(self.files, sizes)


def unreadable(data: bytes) -> str:
    """What is wrong with a record that `Record.from_json` does not take."""
    try:
        schema = int(json.loads(data)["schema"])
    except (ValueError, KeyError, TypeError):
        return UNREADABLE
    version = "an older version" if schema < SCHEMA_VERSION else "a newer version"
    return (
        UNREADABLE
        if schema == SCHEMA_VERSION
        else f"{OTHER_VERSION} {version} (schema {schema}, this one reads {SCHEMA_VERSION})"
    )


def problems_of(files: Mapping[str, FileEntry], sizes: Mapping[str, int]) -> list[Problem]:
    """Listed files that are missing or of another size."""
    found = []
    for name, entry in files.items():
        if name not in sizes:
            found.append(Problem(name, "is missing"))
        elif sizes[name] != entry.bytes:
            found.append(Problem(name, f"is damaged ({sizes[name]} bytes, {entry.bytes} were written)"))
    return found


def entries_to_json(files: Mapping[str, FileEntry]) -> bytes:
    return json.dumps({name: asdict(entry) for name, entry in files.items()}, indent=1).encode()


def entries_from_json(data: bytes) -> dict[str, FileEntry] | None:
    """None for what is no whole list of files."""
    try:
        return {name: FileEntry(**entry) for name, entry in json.loads(data).items()}
    except (ValueError, TypeError, AttributeError):
        return None


def _sum_of(fields: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(fields))  # tuples are lists once they were read back
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
