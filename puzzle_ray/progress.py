"""How long work shows what it does: a protocol, a silent form, and one for terminals and log files."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO


class Bar(Protocol):
    """One stage under way."""

    def advance(self, count: int = 1, **facts: float) -> None:
        """`count` more units are done; `facts` (such as `loss=3.2`) are shown beside the bar."""


class Progress(Protocol):
    """Where a stage reports to."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Bar]:
        """Opens a stage of `total` units; leaving the block closes it."""


class _SilentBar:
    def advance(self, count: int = 1, **facts: float) -> None:
        return None


class Quiet:
    """Shows nothing."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Bar]:
        yield _SilentBar()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _LineBar:
    """Prints at most one line every `every_s` seconds; on a terminal it rewrites one line."""

    def __init__(self, name: str, total: int, unit: str, stream: TextIO, every_s: float) -> None:
        self.name, self.total, self.unit, self.stream = name, total, unit, stream
        self.terminal = stream.isatty()
        self.every_s = 0.2 if self.terminal else every_s
        self.done = 0
        self.started = time.monotonic()
        self.shown = self.started
        self.facts: dict[str, float] = {}
        self.recent: deque[tuple[float, int]] = deque([(self.started, 0)], maxlen=8)  # what rate and time left are taken from

    def advance(self, count: int = 1, **facts: float) -> None:
        self.done += count
        self.facts.update(facts)
        now = time.monotonic()
        if now - self.started < 0.05:  # done before this stage was opened again: no speed of ours
            self.recent[0] = (now, self.done)
        if now - self.shown >= self.every_s:
            self.shown = now
            self._show(now)

    def _show(self, now: float) -> None:
        then, before = self.recent[0]
        self.recent.append((now, self.done))
        rate = max(0, self.done - before) / (now - then) if now > then else 0.0
        left = _duration((self.total - self.done) / rate) if rate > 0 else "?"
        facts = "".join(f" {name}={value:.4g}" for name, value in self.facts.items())
        text = (
            f"  {self.name}: {self.done}/{self.total} {self.unit} ({100 * self.done // max(1, self.total)} %), "
            f"{rate:.3g} {self.unit}/s, {left} left{facts}"
        )
        end = "\033[K\r" if self.terminal else "\n"
        print(text, end=end, file=self.stream, flush=True)

    def close(self) -> None:
        if self.terminal:
            print("\033[K", end="\r", file=self.stream, flush=True)


class Lines:
    """Shows progress on `stream` (stderr): one rewritten line on a terminal, a line every `every_s` seconds in a log."""

    def __init__(self, stream: TextIO | None = None, every_s: float = 5.0) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.every_s = every_s

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Bar]:
        bar = _LineBar(name, total, unit, self.stream, self.every_s)
        try:
            yield bar
        finally:
            bar.close()
