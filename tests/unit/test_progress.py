"""Progress in a log: what is done, of how much, how fast lately, and what is left."""

import io

from puzzle_ray import progress
from puzzle_ray.progress import Lines


def test_rate_and_time_left_follow_the_recent_past(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    with Lines(out, every_s=5.0).stage("library", 1000, "block") as bar:
        for _ in range(100):  # quick at first, one a second
            clock[0] += 1.0
            bar.advance(1, loss=0.5)
        for _ in range(100):  # then ten seconds each
            clock[0] += 10.0
            bar.advance()
    lines = out.getvalue().splitlines()
    assert "library: 5/1000 block (0 %), 1 block/s, 16:35 left loss=0.5" in lines[0]
    assert "library: 200/1000 block (20 %), 0.1 block/s, 2:13:20 left loss=0.5" in lines[-1]


def test_a_log_gets_few_lines(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    with Lines(out, every_s=5.0).stage("x", 1000, "step") as bar:
        for _ in range(1000):
            clock[0] += 0.01
            bar.advance()
    assert out.getvalue().count("\n") == 1
