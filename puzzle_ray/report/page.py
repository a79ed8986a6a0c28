"""The report: one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from puzzle_ray.report import sections, training
from puzzle_ray.report.contents import ReportData, SweepPoint, TrainedVariant
from puzzle_ray.report.markup import Html, join, tag
from puzzle_ray.report.style import SCRIPT, STYLE

__all__ = ["ReportData", "SweepPoint", "TrainedVariant", "render"]

Section = Callable[[ReportData], Sequence[Html] | None]

# id, title, what makes it, what has to be run to get it
SECTIONS: tuple[tuple[str, str, Section, str], ...] = (
    ("frontier", "How much speed costs how much", sections.frontier, "a search, or a sweep over budgets"),
    ("architecture", "The child, layer by layer", sections.architecture, "a search"),
    ("scores", "What each replacement damages", training.scores, "scoring"),
    ("costs", "What each subblock costs", sections.costs, "a profile"),
    ("outcome", "Kept and gained", sections.outcome, "an evaluation of parent and child"),
    ("library", "Blockwise local distillation", training.distillation, "a block library"),
    ("gkd", "Global distillation", training.gkd, "GKD"),
    ("samples", "What they write", training.samples, "an evaluation with a prompt"),
    ("stages", "Where the time went", training.stages, ""),
    ("settings", "Configuration and versions", training.settings, ""),
)


def render(data: ReportData) -> str:
    """A complete HTML document. It fetches nothing and works from a file; sections the run has no data for are left out."""
    shown, missing = [], []
    for name, title, make, needs in SECTIONS:
        content = make(data)
        if content:
            shown.append((name, title, content))
        elif needs:
            missing.append(tag("li", f"{title}: needs {needs}"))
    body = [
        _header(data),
        sections.headline(data),
        tag("nav", *(tag("a", title, href=f"#{name}") for name, title, _ in shown)),
        *(tag("section", tag("h2", title), *content, id=name) for name, title, content in shown),
    ]
    if missing:
        body.append(tag("section", tag("h2", "Not in this report"), tag("ul", *missing), id="missing"))
    head = [
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", f"{data.parent} → child · puzzle_ray"),
        Html('<link rel="icon" href="data:,">'),
        tag("style", Html(STYLE)),
    ]
    page = tag("html", tag("head", *head), tag("body", tag("main", *body), tag("script", Html(SCRIPT))), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _header(data: ReportData) -> Html:
    facts = []
    if data.scenario:
        s = data.scenario
        facts.append(f"batch {s.batch_size}, {s.input_tokens} tokens in, {s.output_tokens} out")
    if data.profile:
        facts.append(f"{data.profile.engine} on {data.profile.device}, {data.profile.dtype}")
    if data.estimated:
        facts.append("costs estimated, not measured")
    arrow = join([data.parent, tag("span", " → child")])
    return tag("header", tag("p", "puzzle_ray report", class_="eyebrow"), tag("h1", arrow), tag("p", " · ".join(facts), class_="note"))
