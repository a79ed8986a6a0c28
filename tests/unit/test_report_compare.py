"""Two reports side by side, and what a point of the frontier holds."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from html_page import Page
from report_inputs import CHOSEN, SWEEP, WHY_UNTIMED, measured_run, untimed, whole_run

from jobs.app import run as run_command
from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.errors import StoreError
from puzzle_ray.report.compare import compare
from puzzle_ray.report.markup import number
from puzzle_ray.report.page import render
from puzzle_ray.report.points import layer_runs
from puzzle_ray.report.summary import SUMMARY, checked, summary
from puzzle_ray.store import Store


def through_json(data):
    return json.loads(json.dumps(summary(data)))


A = through_json(measured_run())
B_RUN = replace(
    measured_run(),
    architecture=replace(CHOSEN, choices=(LayerChoice("noop", "ffn:128"), *CHOSEN.choices[1:])),
    config_yaml="parent: tiny\nsearch:\n  limits: {speedup: 2.0}\n",
)
B = through_json(B_RUN)


def test_the_page_of_two_runs_shows_where_they_differ():
    text = compare([A, B], ["report-a", "report-b"])
    page = Page(text)
    assert page.faults == []
    assert [s["id"] for s in page.all("section")] == ["figures", "frontier", "architecture", "samples", "settings", "stages"]
    assert "1 of 8 layers differ" in page.text and len(page.all("tr", "differs")) == 1
    assert "search.limits.speedup" in page.text and "2.0" in page.text
    assert len(page.all("circle", "point")) == len(page.all("circle", "second")) == len([p for p in SWEEP if p.architecture])
    assert "<script>alert" not in text, "what a model wrote is no markup"


def test_a_run_beside_itself_differs_in_nothing():
    page = Page(compare([A, A], ["a", "a"]))
    assert "0 of 8 layers differ" in page.text and "All settings and versions are the same." in page.text
    assert "Parent: KL" not in page.text, "the parent beside itself"
    assert page.text.count("0\u00a0%") > 10 and not re.search(r"[+−][\d.]+\s%", page.text)


def test_a_run_without_measured_speeds_is_laid_beside_one_with():
    run = measured_run()
    page = Page(compare([A, through_json(replace(run, evaluation=untimed(run.evaluation)))], ["a", "b"]))
    assert page.faults == [] and WHY_UNTIMED in page.text and "Speed-up, measured" in page.text
    neither = Page(compare([through_json(replace(run, evaluation=untimed(run.evaluation)))] * 2, ["a", "b"]))
    assert neither.faults == [] and "Speed-up, measured" not in neither.text and neither.text.count(WHY_UNTIMED) == 2


def test_runs_that_lack_a_part_are_compared_by_the_rest():
    short = through_json(replace(measured_run(), architecture=None, sweep=(), evaluation=None))
    page = Page(compare([A, short], ["a", "b"]))
    assert page.faults == [] and "architecture" not in [s["id"] for s in page.all("section")]


def test_scores_of_two_metrics_have_no_common_axis():
    other = A | {"metric": "lm_loss", "frontier": [point | {"kl": None} for point in A["frontier"]]}
    page = Page(compare([A, other], ["a", "b"]))
    assert "have no common axis" in page.text
    score = number(A["architecture"]["objective"])
    assert cells(page, "Sum of scores") == [f"{score} (kl)", f"{score} (lm_loss)", "–"], "and no difference"
    without = [run | {"architecture": {}} for run in (A, other)]
    assert "Sum of scores" not in Page(compare(without, ["a", "b"])).text, "of runs without a search"


def cells(page, label):
    """Of the table's row that begins with `label`."""
    words = [part.strip() for part in page.text.splitlines() if part.strip()]
    first = words.index(label)
    return words[first + 1 : first + 4]


def test_a_lower_value_is_no_rise_where_values_are_below_zero():
    """A sum of scores of the loss may be: from -0.1 to -0.2 it falls."""
    runs = [A | {"metric": "lm_loss", "architecture": A["architecture"] | {"objective": x}} for x in (-0.1, -0.2)]
    assert cells(Page(compare(runs, ["a", "b"])), "Sum of scores") == ["−0.100", "−0.200", "−100.0\xa0%"]


def test_every_mark_of_the_frontier_opens_its_own_box():
    page = Page(render(measured_run()))
    boxes = [box["id"] for box in page.all("details", "point-details")]
    opening = [mark["data-opens"] for mark in page.all("circle") if "data-opens" in mark]
    assert opening == boxes == [f"point-{n}" for n in range(len(boxes))] and len(boxes) == 5  # four answers and the chosen
    assert all(mark["tabindex"] == "0" and mark["role"] == "button" for mark in page.all("circle") if "data-opens" in mark)
    assert page.text.count("KL after GKD, nats per token") >= 4 and page.text.count("measured KL, nats per token") >= 4


def test_neighbouring_layers_of_one_choice_are_one_row():
    choices = (LayerChoice(), LayerChoice(), LayerChoice("noop", "linear"), LayerChoice())
    assert layer_runs(choices) == [("0–1", choices[0]), ("2", choices[2]), ("3", choices[3])]


def a_report(store, data, **inputs):
    artifact = store.artifact("report", {}, inputs)
    artifact.write("index.html", b"<html>")
    artifact.write_json(SUMMARY, summary(data))
    artifact.finish({})
    return artifact


def test_the_command_writes_the_page_and_refuses_what_is_no_report(tmp_path, capsys):
    store = Store(str(tmp_path / "store"))
    first, second = a_report(store, whole_run(), run="a"), a_report(store, B_RUN, run="b")
    out = tmp_path / "both.html"
    at = ["--store", str(tmp_path / "store"), "--out", str(out)]
    assert run_command(["report-run", first.name, second.name, *at]) == 0
    assert capsys.readouterr().out.strip() == str(out) and "1 of 8 layers differ" in out.read_text()
    assert run_command(["report-run", first.url, second.url, "--out", str(out)]) == 0, "by their folders, whatever the store"
    capsys.readouterr()
    other = store.artifact("library", {}, {})
    other.write("x", b"x")
    other.finish({})
    for names, said in (
        ([first.name], "1 report is given; name two to compare"),
        ([first.name, "report-000000000000"], "there is no 'report-000000000000'"),
        ([first.name, other.name], "is no finished report"),
        ([first.name, "somewhere/else"], "'somewhere/else' is no report"),
    ):
        assert run_command(["report-run", *names, *at]) == 2
        assert said in capsys.readouterr().err
    assert (
        run_command(
            ["report-run", first.name, second.name, "--store", str(tmp_path / "store"), "--out", str(tmp_path / "no" / "x")]
        )
        == 2
    )
    assert "cannot be written" in capsys.readouterr().err


def test_a_summary_of_another_version_is_refused():
    with pytest.raises(StoreError, match="has version 0, and 1 is read here"):
        checked(A | {"version": 0}, "a")
