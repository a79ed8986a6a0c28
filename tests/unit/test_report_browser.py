"""The report in a browser: it draws without a complaint, and nothing is wider than its box."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from report_inputs import measured_run, whole_run

from puzzle_ray.report.compare import compare
from puzzle_ray.report.page import render
from puzzle_ray.report.summary import summary

RUN = whole_run()
RUN = replace(RUN, bld_curves={key: [loss / 1000 for loss in losses] for key, losses in RUN.bld_curves.items()})  # long labels
WHOLE = render(RUN)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=2000",
    "--window-size=500,900", "--dump-dom",
]  # fmt: skip
# Runs at the end of the page: what a person's eyes and finger would find.
PROBE = """
const left = (e) => e.getBoundingClientRect().left;
const sizes = [...document.querySelectorAll("svg path.line, svg circle")].map((e) => e.getBoundingClientRect());
document.querySelector("td[title]").click();
document.body.dataset.probe = [
  sizes.length, sizes.filter((r) => r.width > 0 && r.height > 0).length,
  document.documentElement.scrollWidth <= window.innerWidth,
  [...document.querySelectorAll("svg text")].filter((t) => left(t) < left(t.ownerSVGElement) - 1).map((t) => t.textContent).join(),
  document.getElementById("tip").textContent,
].join("|");
"""


def _opened(path: Path, folder: Path) -> tuple[str, list[str]]:
    """The page as chromium has it after loading, and what it wrote to the console."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_draws_the_page_without_a_complaint(tmp_path):
    page = tmp_path / "index.html"
    page.write_text(WHOLE)
    _, complaints = _opened(page, tmp_path / "profile")
    assert complaints == []
    open_to_probes = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", WHOLE)
    page.write_text(open_to_probes.replace("</body>", f"<script>{PROBE}</script></body>"))
    dom, complaints = _opened(page, tmp_path / "profile")
    assert complaints == []
    marks, drawn, fits, cut_off, tip = re.search(r'data-probe="([^"]*)"', dom)[1].split("|")
    trained = sum(len(losses) > 0 for losses in RUN.bld_curves.values())
    frontier, terms = 1 + 4 + 1 + 1, 3  # its line, the answers, the parent and the chosen; the loss and its two terms
    assert int(marks) == int(drawn) == trained + frontier + terms
    assert fits == "true"
    assert cut_off == "", "labels begin within their charts"
    assert tip.startswith("layer 0: ")


# A click and the Enter key on two points of the chart.
OPENING = """
const [first, second] = document.querySelectorAll("circle[data-opens]");
first.dispatchEvent(new MouseEvent("click", {bubbles: true}));
second.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
const boxes = [...document.querySelectorAll("details.point-details")];
document.body.dataset.probe = [
  boxes.filter((box) => box.open).map((box) => box.id).join(","), boxes.length,
  boxes[0].querySelector("table").getBoundingClientRect().height > 0,
].join("|");
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_point_of_the_frontier_opens_by_click_and_by_key(tmp_path):
    page = tmp_path / "index.html"
    open_to_probes = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render(measured_run()))
    page.write_text(open_to_probes.replace("</body>", f"<script>{OPENING}</script></body>"))
    dom, complaints = _opened(page, tmp_path / "profile")
    assert complaints == []
    assert re.search(r'data-probe="([^"]*)"', dom)[1] == "point-0,point-1|5|true"


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_draws_two_reports_side_by_side(tmp_path):
    page = tmp_path / "index.html"
    page.write_text(compare([summary(measured_run()), summary(whole_run())], ["a", "b"]))
    dom, complaints = _opened(page, tmp_path / "profile")
    assert complaints == [] and "beside" not in dom.partition("<h1>")[2].partition("</h1>")[0], "one parent is named once"
    page.write_text(FRAME.format(page=html.escape(page.read_text()), width=390, allowed="'pre, .wide-map, .scroll'"))
    dom, _ = _opened(page, tmp_path / "profile")
    assert re.search(r'data-probe="([^"]*)"', dom)[1] == "390"


# Opens the page in a frame of a given width, and lists the elements whose content is wider than they are. Heat maps may scroll.
FRAME = """<!DOCTYPE html><body><iframe srcdoc="{page}" style="border:0;width:{width}px;height:14000px"></iframe><script>
addEventListener("load", () => {{
  const frame = document.querySelector("iframe").contentDocument;
  const wide = [...frame.querySelectorAll("body *")].filter((e) =>
    !e.ownerSVGElement && frame.defaultView.getComputedStyle(e).display !== "inline" && e.scrollWidth > e.clientWidth + 1);
  const names = wide.filter((e) => !e.matches({allowed})).map((e) => e.tagName + " " + e.className + " " + e.textContent.slice(0, 40));
  document.body.dataset.probe = [frame.documentElement.scrollWidth, ...names].join("|");
}});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(("width", "allowed"), [(1280, "pre"), (390, "pre, .wide-map")])
def test_nothing_is_wider_than_its_box(width, allowed, tmp_path):
    run = measured_run()
    models = {name: {**model, "downstream_accuracy": 0.71} for name, model in run.models.items()}
    sweep = [replace(point, label="2 x, input_tokens 1024") for point in run.sweep]  # a budget of two axes
    text = render(replace(run, sweep=sweep, evaluation={**run.evaluation, "models": models}))
    page = tmp_path / "index.html"
    page.write_text(FRAME.format(page=html.escape(text), width=width, allowed=f"'{allowed}'"))
    dom, _ = _opened(page, tmp_path / "profile")
    assert re.search(r'data-probe="([^"]*)"', dom)[1] == str(width)
