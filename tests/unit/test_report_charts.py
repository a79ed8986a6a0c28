"""Numbers as text, and charts as pixels."""

from __future__ import annotations

import math

import pytest

from puzzle_ray.report.charts import Axes, binned, log_ticks, tick_label, ticks
from puzzle_ray.report.markup import Html, count, duration, number, percent, tag


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (1.5107, "1.51"), (0.0996, "0.0996"), (9.999, "10.0"), (14191.2, "14\u202f191"), (3.2e-7, "3.20e−07"),
        (-0.25, "−0.250"), (None, "–"), (math.nan, "not finite"),
    ],
)  # fmt: skip
def test_numbers_keep_three_digits(value, text):
    assert number(value) == text


def test_other_figures():
    assert [count(x) for x in (950, 3_421_000, 70.6e9)] == ["950", "3.42\u00a0M", "70.6\u00a0B"]
    assert [percent(0.871), percent(-0.3049, 0, sign=True)] == ["87.1\u00a0%", "−30\u00a0%"]
    assert percent(-0.0001, 0, sign=True) == percent(0.0001, 0, sign=True) == "0\u00a0%"
    assert [percent(math.nan), percent(math.inf, 1, sign=True), count(math.inf), count(math.nan)] == ["not finite"] * 4
    assert [duration(x) for x in (0.083, 12.71, 142, 7_380)] == ["0.083 s", "12.7 s", "2 min 22 s", "2 h 3 min"]
    assert tag("td", "<", Html("<b>"), None, class_="a", title='"') == '<td class="a" title="&quot;">&lt;<b></td>'


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1, 1.83), (0, 0.0031), (-4, 900)])
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 11
    assert low - 1e-9 <= found[0] and found[-1] <= high * (1 + 1e-9)
    steps = {round(b - a, 9) for a, b in zip(found, found[1:], strict=False)}
    assert len(steps) == 1 and f"{steps.pop():e}"[0] in "125"


def test_log_ticks_hold_three_marks_even_within_a_decade():
    assert log_ticks(0.01, 10) == pytest.approx([0.01, 0.1, 1, 10])
    assert log_ticks(0.12, 0.9) == pytest.approx([0.2, 0.5])
    assert log_ticks(0.1, 2) == pytest.approx([0.1, 0.2, 0.5, 1, 2])


def test_binning_keeps_the_mean_and_skips_what_is_not_finite():
    values = [float(i) for i in range(100)]
    points = binned(values, 40)
    assert len(points) <= 40
    assert all(x == y for x, y in points)  # the mean of a run of positions is its centre
    assert binned([1.0, math.nan, 3.0, 5.0], 2) == [(0.5, 1.0), (2.5, 4.0)]


def test_axes_put_the_corners_where_they_belong():
    axes = Axes((0, 10), (0.01, 1), "x", "y", log_y=True)
    assert axes.place(0, 0.01) == (axes.left, axes.bottom)
    assert axes.place(10, 1) == pytest.approx((axes.right, axes.top))
    assert axes.place(5, 0.1)[1] == pytest.approx((axes.top + axes.bottom) / 2)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1200, "1200"), (0.001, "0.001"), (1e-4, "1e−4"), (2e-5, "2e−5"), (5e-12, "5e−12")]
)
def test_labels_of_axes_are_short(value, text):
    assert tick_label(value) == text
