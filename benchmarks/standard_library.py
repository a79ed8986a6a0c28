"""The source files of Python's standard library: text that is there without a network."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from puzzle_ray.errors import DataError

# Left out: tests and bundled third-party code, generated tables (encodings, pydoc_data), and the paths and flags of one machine
# (config-*, _sysconfigdata*).
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data"}
    | {"site-packages", "dist-packages", "__pycache__"}
)
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


def standard_library_files(max_text_bytes: int) -> list[tuple[str, Path]]:
    """(relative path, file) of the sources to learn from, sorted, up to `max_text_bytes` in all.

    Raises DataError where this Python comes without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    chosen: list[tuple[str, Path]] = []
    total_bytes = 0
    for relative, file in sorted((file.relative_to(root).as_posix(), file) for file in _python_files(root)):
        size_bytes = file.stat().st_size
        if total_bytes + size_bytes > max_text_bytes:
            break
        if size_bytes:
            total_bytes += size_bytes
            chosen.append((relative, file))
    if len(chosen) < 2:
        raise DataError(
            "standard library",
            f"{len(chosen)} Python files below {root} within {max_text_bytes} bytes, at least 2 are needed",
            "use a Python that has its .py files, raise max_text_bytes, or give a parent of your own",
        )
    return chosen


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        # skipped folders are not entered, since site-packages alone holds more files than all the rest
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith(SKIPPED_PREFIXES)]
        for name in names:
            if name.endswith(".py") and not name.startswith(SKIPPED_PREFIXES):
                yield Path(folder, name)
