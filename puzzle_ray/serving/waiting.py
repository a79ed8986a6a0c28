"""Requests that wait for a row: callers add them at the end, the engine's thread takes them from the front."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence as SequenceOf

from puzzle_ray.serving.generation import EngineBusy, EngineFailed
from puzzle_ray.serving.sequences import Sequence


class Waiting:
    """A queue of at most `limit` requests. `changed` guards it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.changed = threading.Condition()
        self._queue: deque[Sequence] = deque()
        self._closed: str | None = None

    def __len__(self) -> int:
        return len(self._queue)

    def check(self) -> None:
        """Raises EngineFailed if it takes no more requests."""
        if self._closed is not None:
            raise EngineFailed(self._closed)

    def add(self, sequences: SequenceOf[Sequence]) -> None:
        """All of them, or none. Raises EngineBusy, EngineFailed."""
        with self.changed:
            self.check()
            if len(self._queue) + len(sequences) > self.limit:
                raise EngineBusy(len(self._queue))
            self._queue.extend(sequences)
            self.changed.notify_all()

    def put_back(self, sequence: Sequence) -> None:
        """To the front: it was being answered already."""
        with self.changed:
            self._queue.appendleft(sequence)

    def first(self) -> Sequence | None:
        """The next request, which stays where it is."""
        return self._queue[0] if self._queue else None

    def take(self) -> Sequence:
        """The next request, which leaves."""
        with self.changed:
            return self._queue.popleft()

    def drop_unwanted(self) -> list[Sequence]:
        """Those whose callers want nothing any more leave, wherever they are in the queue."""
        if not any(sequence.generation.unwanted for sequence in tuple(self._queue)):
            return []
        with self.changed:
            gone = [sequence for sequence in self._queue if sequence.generation.unwanted]
            self._queue = deque(sequence for sequence in self._queue if not sequence.generation.unwanted)
        return gone

    def close(self, reason: str) -> None:
        """It takes no more requests. The first reason is what later callers are told."""
        with self.changed:
            self._closed = self._closed or reason
            self.changed.notify_all()

    def empty(self) -> list[Sequence]:
        """All leave."""
        with self.changed:
            left = list(self._queue)
            self._queue.clear()
        return left
