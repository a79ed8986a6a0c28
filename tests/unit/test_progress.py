"""Progress in a log: what is done, of how much, how fast lately, and what is left."""

import io

from puzzle_ray import progress
from puzzle_ray.progress import Display


def test_rate_and_time_left_follow_the_recent_past(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    with Display(out, every_s=5.0).stage("library", 1000, "block") as bar:
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
    with Display(out, every_s=5.0).stage("x", 1000, "step") as bar:
        for _ in range(1000):
            clock[0] += 0.01
            bar.advance()
    assert out.getvalue().count("\n") == 1


def test_work_that_was_done_earlier_is_shown_but_is_no_speed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    with Display(out, every_s=5.0).stage("profile", 1000, "run") as bar:
        bar.advance(900)
        clock[0] += 10.0
        bar.advance(10)
    assert "profile: 910/1000 run (91 %), 1 run/s, 1:30 left" in out.getvalue()


def test_a_terminal_has_a_bar_for_every_open_stage_and_ends_clean():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    display = Display(out)
    with display.stage("library", 4, "block") as library, display.stage("profile [x]", 2, "run") as profile:
        library.advance(4, loss=0.5)
        profile.advance(2)
        assert display._bars is not None
        display._bars.refresh()
        text = out.getvalue()
        assert "library" in text and "4/4 block (100 %)" in text and "loss=0.5" in text
        assert "profile [x]" in text and "2/2 run (100 %)" in text
    assert display._bars is None
    with display.stage("search", 1, "budget") as bar:  # bars start again after all were closed
        bar.advance()
