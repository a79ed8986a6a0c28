"""What is known of a source before it is read: whether it is there, and what its content is identified by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from puzzle_ray.data.files import TextFile, find_files
from puzzle_ray.data.foreign import reading, reason_of
from puzzle_ray.data.settings import DataConfig, TextSource
from puzzle_ray.errors import DataError

_HASHED_BYTES = 64 << 20  # files up to this size are known by their content, larger ones by their size and time of change
_VERSION_FIELDS = ("ETag", "etag", "Content-MD5", "Digest", "md5", "md5Hash", "crc32c", "blob_id", "VersionId", "generation")
_TIME_FIELDS = ("Last-Modified", "LastModified", "last_modified", "last_commit", "updated", "mtime", "created")
_HUB_TIMEOUT_S = 20.0
_CHARACTERS_PER_TOKEN = 4
_COMPRESSED = 3  # a compressed file is taken for the third part of its text


def named_sources(config: DataConfig) -> Iterator[tuple[str, TextSource]]:
    """(what errors call it, a source) of all training and held-out text."""
    for name in ("train", "heldout"):
        for number, source in enumerate(config.sources(name)):
            yield config.where(name, number), source


def source_inputs(config: DataConfig) -> dict[str, str]:
    """What the content of all sources is identified by: `train` and `heldout`, or `train[0]`, `train[1]` of a mixture."""
    named = named_sources(config)
    return {where.removeprefix("data."): source_fingerprint(source.source, where) for where, source in named}


def likely_characters(config: DataConfig) -> int:
    """About how much text will be tokenised: by the sizes of the files and the limits on tokens, whichever is less."""
    sizes = [_size(source.source, where) for where, source in named_sources(config)]
    limit = _CHARACTERS_PER_TOKEN * (config.max_train_tokens + config.max_heldout_tokens)
    return limit if None in sizes or config.source_end == "repeat" else min(limit, sum(size or 0 for size in sizes))


def _size(source: str, where: str) -> int | None:
    """Bytes of a source's text, about; None where nobody says."""
    files = find_files(source, where).files
    total = 0
    for file in files:
        with reading(file.name, where):
            size = Path(file.path).stat().st_size if file.filesystem is None else file.info().get("size")
        if size is None:
            return None
        total += int(size) * (_COMPRESSED if file.compression else 1)
    return total if files else None


def check_source(source: str, where: str) -> None:
    """Cheap check before any work. Raises DataError for a path that does not exist or holds no text files, or is empty."""
    found = find_files(source, where)
    if found.files:
        if "://" not in source and all(Path(file.path).stat().st_size == 0 for file in found.files):
            raise DataError(where, f"{source!r} is empty", "name a file with text in it")
        return
    named_as_file = TextFile(source, source).format is not None
    looks_like_path = source.startswith((".", "/", "~")) or "://" in source or named_as_file or source.count("/") > 1
    if looks_like_path or Path(source).exists():
        remedy = "name a file, a folder, a glob, a URL or a hub id"
        if found.left_out:
            remedy += "; write tables of other kinds, such as .csv, as .jsonl or .parquet"
        raise DataError(where, f"no .txt, .jsonl or .parquet file at {source!r}", remedy)


def check_apart(config: DataConfig) -> None:
    """Raises DataError where held-out text is trained on. Only names are compared: of files, or of parts of a hub data set."""
    train: dict[tuple[str | None, ...], str] = {}
    for where, source in named_sources(config):
        own = config.read_as(source)
        files = find_files(source.source, where).files
        places = [str(Path(f.path).resolve()) if f.filesystem is None else f.name for f in files]
        named: list[tuple[str | None, ...]] = [(place, own.text_column) for place in places]
        for key in named or [(source.source, own.text_column, own.config_name, own.split)]:
            if where.startswith("data.train"):
                train[key] = where
            elif key in train:
                remedy = "name other text, or leave data.heldout out: then a share of the text is held out"
                raise DataError(where, f"{key[0]} is text of {train[key]}, too", remedy)


def source_fingerprint(source: str, where: str = "data") -> str:
    """Changes when the content of a source does.

    A file of this machine: its name, its size and its content (above 64 MB its time of change). A URL: its size with its ETag or
    checksum, else its time of change, else its first 64 MB. A hub data set: the commit it is at.

    Raises DataError where it cannot be reached.
    """
    files = find_files(source, where).files
    if not files:
        check_source(source, where)
        return hashlib.sha256(f"{source}@{hub_commit(source, where)}".encode()).hexdigest()
    digest = hashlib.sha256()
    for file in files:
        with reading(file.name, where):
            if file.filesystem is not None:
                digest.update(_remote_identity(file))
                continue
            path = Path(file.path)
            digest.update(f"{path.name}:{path.stat().st_size}:".encode())
            if path.stat().st_size <= _HASHED_BYTES:
                digest.update(path.read_bytes())
            else:
                digest.update(str(path.stat().st_mtime_ns).encode())
    return digest.hexdigest()


def _remote_identity(file: TextFile) -> bytes:
    info = file.info()
    for fields in (_VERSION_FIELDS, _TIME_FIELDS):
        known = {field: str(info[field]) for field in fields if info.get(field)}
        if known:
            return f"{file.name}:{info.get('size')}:{sorted(known.items())}".encode()
    digest = hashlib.sha256()
    left = _HASHED_BYTES
    with file.open() as stream:
        while left > 0 and (block := stream.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return f"{file.name}:{info.get('size')}:{digest.hexdigest()}".encode()


def hub_commit(source: str, where: str, api: Any = None) -> str:
    """The commit a data set of the hub is at. Raises DataError, without many tries, where it cannot be had."""
    from huggingface_hub import HfApi

    try:
        return str((api or HfApi()).dataset_info(source, timeout=_HUB_TIMEOUT_S).sha)
    except Exception as error:  # the hub's client raises its own errors and those of the library for http below it
        problem = f"there is no file {source!r}, and no data set of that name can be had of the hub ({reason_of(error)})"
        raise DataError(where, problem, "name a path that exists, or a data set of the hub that you can reach") from None
