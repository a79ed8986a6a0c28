"""The report: one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence

from puzzle_ray.report import blocks, chosen, kept, outcome, picking, text, training
from puzzle_ray.report.contents import ReportData, SweepPoint, TrainedVariant
from puzzle_ray.report.markup import Html, tag
from puzzle_ray.report.style import SCRIPT, STYLE

__all__ = ["ReportData", "SweepPoint", "TrainedVariant", "render"]

Section = Callable[[ReportData], Sequence[Html] | None]

# id, title, what makes it, and what has to be run to get it
SECTIONS: tuple[tuple[str, str, Section, str], ...] = (
    ("frontier", "Accuracy against speed", chosen.frontier, "a search, or a sweep over budgets"),
    ("pick", "Measured children", picking.measured_children, "a search that measures children: search.candidates of 2 or more"),
    ("architecture", "Architecture", chosen.architecture, "a search"),
    ("scores", "Replace-one damage", blocks.replace_one_damage, "scoring"),
    ("costs", "Costs", blocks.subblock_costs, "a profile"),
    ("outcome", "Evaluation", outcome.evaluation, "an evaluation of parent and child"),
    ("tasks", "Kept of the parent's answers", kept.tasks, "an evaluation with evaluate.tasks"),
    ("differences", "Where predictions differ", kept.differences, "an evaluation of parent and child"),
    ("retrieval", "Retrieval from long context", kept.retrieval, "an evaluation with evaluate.retrieval_tokens"),
    ("text", "Text", text.sources, ""),
    ("library", "Block distillation", blocks.block_distillation, "a block library"),
    ("gkd", "Global distillation", training.global_distillation, "GKD"),
    ("samples", "Samples", kept.samples, "an evaluation with a prompt"),
    ("stages", "Time by stage", outcome.stage_times, ""),
    ("settings", "Configuration and versions", outcome.configuration, ""),
)


def render(data: ReportData) -> str:
    """A complete HTML document. It fetches nothing and works from a file. A section without data is left out."""
    shown, missing = [], []
    for name, title, make, needs in SECTIONS:
        content = make(data)
        if content:
            shown.append((name, title, content))
        elif needs:
            missing.append(tag("li", f"{title}: needs {needs}"))
    body = [
        _header(data),
        outcome.headline(data),
        tag("nav", *(tag("a", title, href=f"#{name}") for name, title, _ in shown)),
        *(tag("section", tag("h2", title), *content, id=name) for name, title, content in shown),
    ]
    if missing:
        body.append(tag("section", tag("h2", "Not in this report"), tag("ul", *missing), id="missing"))
    return document(f"{data.parent} → child · puzzle_ray", body)


def document(title: str, body: Sequence[Html | None]) -> str:
    """A complete HTML document with our style and script."""
    head = [
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">'),
        tag("title", title),
        Html('<link rel="icon" href="data:,">'),
        tag("style", Html(STYLE)),
    ]
    page = tag("html", tag("head", *head), tag("body", tag("main", *body), tag("script", Html(SCRIPT))), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _header(data: ReportData) -> Html:
    profile = data.profile
    facts = [data.serving, f"{profile.engine} on {profile.device}, {profile.dtype}" if profile else ""]
    facts.append("costs estimated, not measured" if data.estimated else "")
    above, name = tag("p", "puzzle_ray report", class_="eyebrow"), tag("h1", data.parent, tag("span", " → child"))
    return tag("header", above, name, tag("p", " · ".join(fact for fact in facts if fact), class_="note"))


def _policy() -> str:
    """A policy that forbids all fetches, and all scripts except the page's own. A browser enforces it."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
