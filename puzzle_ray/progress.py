"""How long work shows its progress: the protocols `Progress` and `Bar`, a silent form, and one for terminals and log files."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    import rich.progress

RESUMED_WITHIN_S = 0.05  # units that are reported so soon after a stage opens were done in an earlier run
REDRAW_S = 0.2  # of a bar on a terminal
RATE_POINTS = 8  # the rate is taken over this many times `every_s`


class Bar(Protocol):
    """One stage under way."""

    def advance(self, count: int = 1, **facts: float) -> None:
        """`count` more units are done. `facts` (such as `loss=3.2`) are shown beside the bar."""


class Progress(Protocol):
    """Where stages report to. Several may be open at once."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Bar]:
        """Opens a stage of `total` units. Leaving the block closes it."""


class _SilentBar:
    def advance(self, count: int = 1, **facts: float) -> None:
        return None


class Quiet:
    """Shows nothing."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Bar]:
        yield _SilentBar()


class Display:
    """Shows progress on `stream` (stderr): rich's bars on a terminal, and in a log a line per stage at most every `every_s` seconds."""

    def __init__(self, stream: TextIO | None = None, every_s: float = 5.0) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.every_s = every_s
        self._lock = threading.Lock()  # guards the two below
        self._bars: rich.progress.Progress | None = None  # what draws all open stages
        self._open_stages = 0

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Bar]:
        if not self.stream.isatty():
            yield _LogBar(_Stage(name, total, unit, self.every_s), self.stream)
            return
        bars = self._opened()
        try:
            bar = _TerminalBar(_Stage(name, total, unit, self.every_s), bars)
            try:
                yield bar
            finally:
                bar.remove()
        finally:
            self._closed()

    def _opened(self) -> rich.progress.Progress:
        """The bars on the terminal, with room for one more stage."""
        with self._lock:
            if self._bars is None:
                self._bars = _bars_on(self.stream)
                self._bars.start()
            self._open_stages += 1
            return self._bars

    def _closed(self) -> None:
        with self._lock:
            self._open_stages -= 1
            if self._bars is not None and not self._open_stages:
                self._bars.stop()
                self._bars = None


def _bars_on(stream: TextIO) -> rich.progress.Progress:
    """Bars that vanish when they stop. What is printed to stderr meanwhile appears above them."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    console = Console(file=stream)  # only stderr is redirected above the bars: results on stdout may go to a file
    return Progress(*columns, console=console, transient=True, redirect_stdout=False, refresh_per_second=1 / REDRAW_S)


class _Stage:
    """What is done of a stage, how fast, and what is left."""

    def __init__(self, name: str, total: int, unit: str, every_s: float) -> None:
        self.name, self.total, self.unit, self.every_s = name, total, unit, every_s
        self.done = 0
        self.started = time.monotonic()
        self.facts: dict[str, float] = {}
        self.recent: deque[tuple[float, int]] = deque([(self.started, 0)], maxlen=RATE_POINTS)  # (when, units done by then)

    def advance(self, count: int, facts: dict[str, float]) -> float:
        """Counts, and returns the time."""
        self.done += count
        self.facts.update(facts)
        now = time.monotonic()
        if now - self.started < RESUMED_WITHIN_S:
            self.recent[0] = (now, self.done)
        return now

    def status(self, now: float) -> str:
        """`200/1000 block (20 %), 0.1 block/s, 2:13:20 left loss=0.5`."""
        then, before = self.recent[0]
        if now - self.recent[-1][0] >= self.every_s:
            self.recent.append((now, self.done))
        rate = max(0, self.done - before) / (now - then) if now > then else 0.0
        left = _duration((self.total - self.done) / rate) if rate > 0 else "?"
        facts = "".join(f" {name}={value:.4g}" for name, value in self.facts.items())
        percent = 100 * self.done // max(1, self.total)
        return f"{self.done}/{self.total} {self.unit} ({percent} %), {rate:.3g} {self.unit}/s, {left} left{facts}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _LogBar:
    """Prints at most one line every `every_s` seconds."""

    def __init__(self, stage: _Stage, stream: TextIO) -> None:
        self.stage, self.stream = stage, stream
        self.printed = stage.started

    def advance(self, count: int = 1, **facts: float) -> None:
        now = self.stage.advance(count, facts)
        if now - self.printed >= self.stage.every_s:
            self.printed = now
            print(f"  {self.stage.name}: {self.stage.status(now)}", file=self.stream, flush=True)


class _TerminalBar:
    """One of rich's bars."""

    def __init__(self, stage: _Stage, bars: rich.progress.Progress) -> None:
        self.stage, self.bars = stage, bars
        self.drawn = stage.started
        self.task = bars.add_task(f"  {stage.name}", total=stage.total, status=stage.status(stage.started))

    def advance(self, count: int = 1, **facts: float) -> None:
        now = self.stage.advance(count, facts)
        if now - self.drawn >= REDRAW_S or self.stage.done >= self.stage.total:
            self.drawn = now
            self.bars.update(self.task, completed=self.stage.done, status=self.stage.status(now))

    def remove(self) -> None:
        self.bars.remove_task(self.task)
