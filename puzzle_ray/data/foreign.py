"""The one place where what other libraries raise while they read data becomes a DataError of one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from puzzle_ray.errors import DataError, PuzzleError

_LONGEST_REASON = 300


def reason_of(error: BaseException, name: str = "") -> str:
    """The first line of an error; of its cause, where it says no more than `name`. An error without words is told by its type."""
    current: BaseException | None = error
    while current is not None:
        lines = [line.strip() for line in str(current).splitlines() if line.strip()]
        if lines and lines[0] != name:
            return lines[0][:_LONGEST_REASON]
        current = current.__cause__
    return type(error).__name__


@contextmanager
def reading(name: str, where: str, remedy: str = "name a file, a folder, a URL or a hub id") -> Iterator[None]:
    """Whatever is raised inside becomes a DataError that names `name`. Every backend and format has errors of its own."""
    try:
        yield
    except PuzzleError:
        raise
    except Exception as error:
        raise DataError(where, f"{name!r} cannot be read ({reason_of(error, name)})", remedy) from None
