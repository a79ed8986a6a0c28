"""Work that is done once, however many runs ask for it at the same time, and done again where its result is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from puzzle_ray.store.artifact import Artifact
from puzzle_ray.store.lease import say_on_stderr

_ONLY_LOOKING = ContextVar("only_looking", default=False)


class StillToDo(Exception):
    """Work that a look found, by its artifact."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(f"{artifact.name} is still to be done")
        self.artifact = artifact


@contextmanager
def only_looking() -> Iterator[None]:
    """Here `do_once` does nothing: it raises StillToDo for what is not finished."""
    before = _ONLY_LOOKING.set(True)
    try:
        yield
    finally:
        _ONLY_LOOKING.reset(before)


def do_once(artifact: Artifact, work: Callable[[Artifact], None], say: Callable[[str], None] = say_on_stderr) -> bool:
    """Does `work` unless the artifact is finished; returns whether it did.

    Waits for another run that does it. What is damaged, or was half written by a run that died, is removed first and told to `say`.
    In `only_looking`, raises StillToDo in place of all that.
    """
    if artifact.finished:
        return False
    if _ONLY_LOOKING.get():
        raise StillToDo(artifact)
    with artifact.lease(say=say):
        if artifact.finished:  # by the run that was waited for
            return False
        _discard(artifact, say)
        if artifact.finished:  # nothing was wrong with it
            return False
        work(artifact)
        return True


@contextmanager
def adding_items(artifact: Artifact, say: Callable[[str], None] = say_on_stderr) -> Iterator[None]:
    """For artifacts that are never finished, such as measurements that all budgets share: no other run adds to them meanwhile."""
    with artifact.lease(say=say):
        _discard(artifact, say)
        yield


def _discard(artifact: Artifact, say: Callable[[str], None]) -> None:
    for name in artifact.discard_damage():
        say(f"[{artifact.stage}] {name} was damaged and is made again")
