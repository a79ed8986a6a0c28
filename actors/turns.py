"""Computing processes of one node take turns on its cores.

More of them at a time than there are cores only drive each other out of the caches: eight trainers on two cores take a twentieth to a
tenth more CPU time when they share them by the kernel's time slices. Where there is a core for everyone nobody ever waits.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from puzzle_ray.process import num_cores

POLL_S = 0.005  # a turn is a tenth of a second and more


class Turns:
    """A turn takes `num_threads` cores, or all where there are fewer. Processes with the same `run` on one node share its cores.

    A core is a byte of a file that the holder has locked: a process that dies gives back what it held. Of those that want equally many
    cores, one at a time looks for them; the others wait, in the kernel, for its place in front. Within one process turns do not wait
    for each other.
    """

    def __init__(self, run: str, num_threads: int, cores: int | None = None) -> None:
        cores = cores or num_cores()
        self.width = min(num_threads, cores)
        first = _offset(run)
        self.places = range(first, first + cores - self.width + 1)
        self.front = _offset(f"{run}, {self.width} of {cores}")
        self.file = (Path(tempfile.gettempdir()) / f"puzzle-ray-turns-{os.getuid()}").open("a+b")

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Waits until enough cores are free, and holds them."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX, 1, self.front)
            place = self._take()
        finally:
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, self.front)
        try:
            yield
        finally:
            fcntl.lockf(self.file, fcntl.LOCK_UN, self.width, place)

    def _take(self) -> int:
        while True:
            for place in self.places:
                try:
                    fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, self.width, place)
                    return place
                except (BlockingIOError, PermissionError):  # another process has it
                    continue
            time.sleep(POLL_S)


def _offset(what: str) -> int:
    """Where the bytes for `what` on this node begin; nodes may share a folder for temporary files."""
    return int(hashlib.sha256(f"{platform.node()}, {what}".encode()).hexdigest()[:8], 16) << 16
