"""The one place where what other libraries raise while they read data becomes a DataError of one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from puzzle_ray.errors import DataError, PuzzleError

_LONGEST_REASON = 300


def reason_of(error: BaseException) -> str:
    """The first line of an error, and of what caused it. An error without words is told by its type."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None and len(parts) < 3:
        lines = [line.strip() for line in str(current).splitlines() if line.strip()]
        text = lines[0] if lines else type(current).__name__
        if not any(text in part for part in parts):
            parts.append(text)
        current = current.__cause__
    return ": ".join(parts)[:_LONGEST_REASON]


@contextmanager
def reading(name: str, where: str, remedy: str = "name a file, a folder, a URL or a hub id") -> Iterator[None]:
    """Whatever is raised inside becomes a DataError that names `name`. Every backend and format has errors of its own."""
    try:
        yield
    except PuzzleError:
        raise
    except Exception as error:
        raise DataError(where, f"{name!r} cannot be read ({reason_of(error)})", remedy) from None
