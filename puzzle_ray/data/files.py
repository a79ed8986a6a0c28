"""Which files a source means: a path, a folder, a glob or a URL of them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from puzzle_ray.data.foreign import reading
from puzzle_ray.errors import DataError

Format = Literal["text", "json", "parquet"]

_FORMATS: dict[str, Format] = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_ABOUT_THE_DATA = {  # by format: what files of these names hold; the part before the first dot, `-` and spaces written as `_`
    "text": re.compile(
        r"(readme|licen[cs]e|copying|changelog|contributing|code_of_conduct|(data|dataset|model)_?card)(_.*)?"
        r"|notice|authors|citation|card"
    ),
    "json": re.compile(r"dataset_infos?"),
}


@dataclass(frozen=True)
class TextFile:
    """A file of text. `name` is what errors show; `path` is what `filesystem` opens (None: this machine's own files).

    `broken`: a link to what is not there, or back to a folder that it lies in.
    """

    name: str
    path: str
    filesystem: Any = None
    broken: bool = False

    @property
    def _suffixes(self) -> tuple[str, str]:
        """(kind, compression), lower case; the second is empty where the file is not compressed."""
        path = PurePosixPath(urlsplit(self.path).path if self.is_http else Path(self.path).name)
        last = path.suffix.lower()
        return (PurePosixPath(path.stem).suffix.lower(), last) if last in _COMPRESSIONS else (last, "")

    @property
    def is_http(self) -> bool:
        return self.path.startswith(("http://", "https://"))

    @property
    def format(self) -> Format | None:
        """None where this is no file of text."""
        kind, compression = self._suffixes
        return None if self.broken or (compression and kind == ".parquet") else _FORMATS.get(kind)

    @property
    def is_json_lines(self) -> bool:
        return self._suffixes[0] == ".jsonl"

    @property
    def compression(self) -> str | None:
        return _COMPRESSIONS.get(self._suffixes[1])

    def info(self) -> dict[str, Any]:
        """What the filesystem of a URL knows: size, ETag, time of change, as far as it has them."""
        return dict(self.filesystem.info(self.path))

    def open(self) -> Any:
        """Its bytes as they lie there. A file behind http is read from its beginning on and cannot be sought in."""
        if self.filesystem is None:
            return open(self.path, "rb")
        return self.filesystem.open(self.path, "rb", **({"block_size": 0} if self.is_http else {}))


@dataclass(frozen=True)
class Found:
    """The files of a source, all of one format, and the names of those left out. No files: it can only be a hub id."""

    files: tuple[TextFile, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def format(self) -> Format | None:
        return self.files[0].format if self.files else None


def find_files(source: str, where: str = "data") -> Found:
    """The files of a path, folder, glob or URL. A name that exists is taken literally, whatever characters it has.

    Raises DataError.
    """
    if not source.strip():
        raise DataError(where, f"{source!r} names nothing", "name a file, a folder, a URL or a hub id")
    with reading(source, where):
        if "://" in source:
            found, literal = _remote(source, where)
        else:
            found, literal = _local(source)
    if literal:
        return Found(tuple(file for file in found if file.format), tuple(file.name for file in found if not file.format))
    return _of_one_kind(source, found, where)


def _local(source: str) -> tuple[list[TextFile], bool]:
    path = Path(source).expanduser()
    if path.is_file():
        return [TextFile(str(path), str(path))], True
    if path.is_dir():
        return _below(str(path), ()), False
    above = glob.escape(str(path.parent)) if path.parent.is_dir() else str(path.parent)  # a folder's own brackets mean themselves
    named = glob.glob(os.path.join(above, path.name), recursive=True)
    found = [(name, os.path.isfile(name)) for name in sorted(named) if not _goes_round(name)]
    files = [TextFile(name, name, broken=not is_file) for name, is_file in found if is_file or not os.path.exists(name)]
    return _visible(files, str(path.parent)), False


def _goes_round(name: str) -> bool:
    """Whether the path enters a folder twice, by a link back to it."""
    entered = [os.path.realpath(folder) for folder in Path(os.path.abspath(name)).parents]
    return len(set(entered)) < len(entered)


def _below(folder: str, above: tuple[str, ...]) -> list[TextFile]:
    """The files of a folder and of its folders, linked ones too, by name. A link back to a folder `above` is broken."""
    found = []
    above = (*above, os.path.realpath(folder))
    for name in sorted(name for name in os.listdir(folder) if not name.startswith(".")):
        path = os.path.join(folder, name)
        circle = os.path.islink(path) and os.path.realpath(path) in above
        if os.path.isdir(path) and not circle:
            found += _below(path, above)
        elif circle or os.path.isfile(path) or not os.path.exists(path):
            found.append(TextFile(path, path, broken=circle or not os.path.isfile(path)))
    return sorted(found, key=lambda file: file.path)


def _visible(files: Iterable[TextFile], base: str) -> list[TextFile]:
    """Without hidden files and what lies in hidden folders below `base`."""
    kept = []
    for file in files:
        below = file.path.removeprefix(base) if file.path.startswith(base) else file.path.rsplit("/", 1)[-1]
        if not any(part.startswith(".") for part in below.split("/")):
            kept.append(file)
    return kept


def _remote(source: str, where: str) -> tuple[list[TextFile], bool]:
    import fsspec

    try:
        # a listing that is remembered would hide a file that was replaced
        filesystem, path = fsspec.core.url_to_fs(source, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise DataError(where, f"{source!r} cannot be opened ({error})", "name a file, a folder or an fsspec URL") from None

    def named(found: str) -> TextFile:
        name = found if "://" in found else str(filesystem.unstrip_protocol(found))
        return TextFile(name, found, filesystem)

    if path.startswith(("http://", "https://")):
        found, literal = _over_http(source, filesystem)
    else:
        found, literal = _in_a_store(filesystem, path)
    files = [named(name) for name in found]
    return (files if literal else _visible(files, path.rstrip("/"))), literal


def _over_http(source: str, filesystem: Any) -> tuple[list[str], bool]:
    """No question that makes a server send a whole file: only what ends in `/` is asked for its links."""
    if "*" in source:
        return sorted(filesystem.glob(source)), False
    if urlsplit(source).path.endswith("/"):
        return sorted(name for name in filesystem.ls(source, detail=False) if not name.endswith("/")), False
    if TextFile(source, source).format is None:
        return [], True
    filesystem.info(source)  # raises where it is not there
    return [source], True


def _in_a_store(filesystem: Any, path: str) -> tuple[list[str], bool]:
    try:
        kind = filesystem.info(path)["type"]
    except FileNotFoundError:
        kind = ""
    if kind == "file":
        return [path], True
    if kind == "directory":
        return sorted(filesystem.find(path)), False
    return sorted(name for name, info in filesystem.glob(path, detail=True).items() if info["type"] == "file"), False


def _is_about_the_data(file: TextFile) -> bool:
    names = _ABOUT_THE_DATA.get(str(file.format))
    stem = re.sub("[- ]", "_", Path(file.path).name.split(".")[0].lower())
    return names is not None and names.fullmatch(stem) is not None


def _of_one_kind(source: str, found: list[TextFile], where: str) -> Found:
    """Raises DataError for a mix of formats, and where all there is is about the data."""
    text = [file for file in found if file.format]
    kept = [file for file in text if not _is_about_the_data(file)]
    formats = sorted({str(file.format) for file in kept})
    saved = all(file.path.endswith(".json") for file in kept)  # beside the tables, datasets keeps what they are about
    if saved and any(file.path.endswith(".arrow") for file in found):
        problem = f"{source!r} holds .arrow files, as the datasets library keeps them for itself"
        raise DataError(where, problem, "write them as text: datasets.load_from_disk(FOLDER), then to_parquet or to_json")
    if len(formats) > 1:
        raise DataError(where, f"{source!r} mixes {', '.join(formats)} files", "name a glob of one kind")
    if text and not kept:
        names = ", ".join(repr(Path(file.path).name) for file in text[:3])
        raise DataError(where, f"{source!r} holds no text but {names}", "name that file itself to read it as text")
    return Found(tuple(kept), tuple(file.name for file in found if file not in kept))
