"""What the library stage does when its actors die: it goes on from what is saved, and gives up where nothing advances any more."""

import pytest

from actors import library_stream
from actors.library_stream import _Counting, _Interrupted, _run
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.errors import ClusterError

POSITIONS = 10


class StandIn:
    """A stream and its text. `saved`: the last position that trainers know, at each start."""

    def __init__(self, saved, max_recoveries):
        self.saved, self.started_at = iter(saved), []
        self.cluster = ClusterConfig(max_recoveries=max_recoveries)
        self.schedule = type("Schedule", (), {"positions": POSITIONS})

    def last(self):
        return next(self.saved)


class Bar:
    def __init__(self):
        self.done = 0

    def advance(self, count=1, **facts):
        self.done += count


def run(monkeypatch, saved, deaths, max_recoveries):
    """Where it started each time, and what the bar shows at the end; the first `deaths` flows are interrupted three steps on."""
    stream, bar = StandIn(saved, max_recoveries), Bar()

    def flow(stream, positions, text, window, bar, stop):
        stream.started_at.append(positions.start)
        dies = len(stream.started_at) <= deaths
        bar.advance(min(3, len(positions)) if dies else len(positions))
        if dies:
            raise _Interrupted("a trainer died\nin two lines")
        return True

    monkeypatch.setattr(library_stream, "flow", flow)
    assert _run(stream, stream, 2, _Counting(bar))
    return stream.started_at, bar.done


def test_deaths_are_counted_from_the_last_progress_that_was_saved(monkeypatch):
    """Five deaths in all, never more than two of them at the same place."""
    assert run(monkeypatch, (-1, -1, 1, 1, 3, 5), deaths=5, max_recoveries=2) == ([0, 0, 2, 2, 4, 6], POSITIONS)


def test_deaths_without_progress_end_the_run(monkeypatch):
    with pytest.raises(ClusterError, match="trainers died 3 times without progress; the last time: a trainer died; see") as error:
        run(monkeypatch, (-1, 3, 3, 3), deaths=9, max_recoveries=2)
    assert "two lines" not in str(error.value)


def test_going_back_is_no_progress(monkeypatch):
    """A trainer that lost its last checkpoint, and comes as far as it was, has advanced nothing."""
    with pytest.raises(ClusterError, match="died 3 times without progress"):
        run(monkeypatch, (5, 2, 5, 5), deaths=9, max_recoveries=2)
