"""Where text comes from: files, folders, globs, URLs, and data sets of a hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from puzzle_ray.data.settings import DataConfig
from puzzle_ray.errors import DataError

_FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def _files(source: str) -> tuple[str, list[str]]:
    """(format, files) of a path, folder, glob or URL; an empty list means that it must be a hub id."""
    import fsspec

    if "://" in source:
        try:
            filesystem, path = fsspec.core.url_to_fs(source)
        except (ValueError, ImportError) as error:
            raise DataError("data", f"{source!r} cannot be opened ({error})", "name a file, a folder or an fsspec URL") from None
        protocol = source.split("://", 1)[0] + "://"
        found = sorted(filesystem.find(path)) if filesystem.isdir(path) else sorted(filesystem.glob(path))
        found = [protocol + name for name in found]
    else:
        path = Path(source).expanduser()
        if path.is_dir():
            found = sorted(str(p) for p in path.rglob("*") if p.is_file())
        elif path.is_file():
            found = [str(path)]
        else:
            found = sorted(str(p) for p in path.parent.glob(path.name)) if path.parent.is_dir() else []
    kept = [name for name in found if Path(name).suffix in _FORMATS]
    formats = {_FORMATS[Path(name).suffix] for name in kept}
    if len(formats) > 1:
        raise DataError("data", f"{source!r} mixes {', '.join(sorted(formats))} files", "name a glob of one kind")
    return (formats.pop() if formats else ""), kept


def check_source(source: str, where: str) -> None:
    """Cheap check before any work. Raises DataError for a path that does not exist or holds no text files, or is empty."""
    kind, files = _files(source)
    if files:
        if "://" not in source and all(Path(name).stat().st_size == 0 for name in files):
            raise DataError(where, f"{source!r} is empty", "name a file with text in it")
        return
    looks_like_path = (
        source.startswith((".", "/", "~")) or "://" in source or Path(source).suffix in _FORMATS or source.count("/") > 1
    )
    if looks_like_path or Path(source).exists():
        raise DataError(
            where, f"no .txt, .jsonl or .parquet file at {source!r}", "name a file, a folder, a glob, a URL or a hub id"
        )


def documents(source: str, config: DataConfig, where: str) -> Iterator[str]:
    """The documents of a source, in order. A .txt file is one document. Raises DataError."""
    kind, files = _files(source)
    if kind == "text":
        import fsspec

        for name in files:
            with fsspec.open(name, "r", encoding="utf-8", errors="replace") as file:
                yield file.read()
        return
    import datasets

    datasets.disable_progress_bars()
    try:
        if kind:
            rows = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
        else:
            check_source(source, where)
            rows = datasets.load_dataset(source, split=config.split, streaming=True)
        for row in rows:
            if config.text_column not in row:
                raise DataError(
                    f"{where}: {source!r}", f"no column {config.text_column!r}", f"data.text_column is one of {sorted(row)}"
                )
            if row[config.text_column]:
                yield row[config.text_column]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(where, f"{source!r} cannot be read ({reason})", "name a file, a folder, a URL or a hub id") from None


def source_fingerprint(source: str) -> str:
    """Changes when a local source's files do (name, size, time of change); a hub id or URL stands for itself."""
    _, files = _files(source)
    digest = hashlib.sha256(source.encode() if not files else b"")
    for name in files:
        path = Path(name)
        if "://" in name:
            digest.update(name.encode())
        else:
            digest.update(f"{path.name}:{path.stat().st_size}:".encode())
            if path.stat().st_size <= 64 << 20:
                digest.update(path.read_bytes())
            else:
                digest.update(str(path.stat().st_mtime_ns).encode())
    return digest.hexdigest()
