"""Two runs side by side: one HTML page from their summaries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from puzzle_ray.report.charts import Axes, Point
from puzzle_ray.report.contents import MODEL_NAMES, UNITS, shown
from puzzle_ray.report.markup import (
    Html,
    count,
    duration,
    html_table,
    join,
    legend,
    note,
    number,
    percent,
    tag,
    times,
)
from puzzle_ray.report.outcome import FIGURES, written_figure
from puzzle_ray.report.page import document

Summary = Mapping[str, Any]
NAMES = ("A", "B")
QUALITY = ("heldout_loss", "kl", "top1_agreement", "downstream_accuracy")
OF_PARENT = ("kl", "top1_agreement")  # what is measured against the parent
PREDICTED = {
    "memory_mib": "memory, MiB",
    "num_params": "parameters",
    "prefill_ms": "prefill, ms",
    "decode_ms": "decoding step, ms",
}


def compare(runs: Sequence[Summary], where: Sequence[str]) -> str:
    """A complete HTML document. `where` says which report each run's is."""
    sections = (
        ("figures", "Figures", _figures(runs)),
        ("frontier", "Accuracy against speed", _frontiers(runs)),
        ("architecture", "Architecture", _architectures(runs)),
        ("samples", "Samples", _samples(runs)),
        ("settings", "Settings that differ", _settings(runs)),
        ("stages", "Time by stage", _stages(runs)),
    )
    known = [(name, title, content) for name, title, content in sections if content is not None]
    parents = " beside ".join(dict.fromkeys(run["parent"] for run in runs))
    places = (note(tag("b", name), f": {place} · {run['serving']}") for name, place, run in zip(NAMES, where, runs, strict=True))
    body = [
        tag("header", tag("p", "puzzle_ray, two reports", class_="eyebrow"), tag("h1", parents), *places),
        tag("nav", *(tag("a", title, href=f"#{name}") for name, title, _ in known)),
        *(tag("section", tag("h2", title), content, id=name) for name, title, content in known),
    ]
    return document(f"{parents} · two runs · puzzle_ray", body)


def _figures(runs: Sequence[Summary]) -> Html:
    """What each run reached: the last child of each, and what was predicted."""
    rows: list[list[object]] = []

    def add(label: str, values: Sequence[float | None], written: Any) -> None:
        if any(value is not None for value in values):
            rows.append([label, *(written(value) for value in values), _difference(*values)])

    add("Speed-up, measured", [run.get("measured_speedup") for run in runs], times)
    if any("not_measured" in run for run in runs):
        others = ("measured" if run.get("measured_speedup") else "–" for run in runs)
        rows.append(["Speed", *(run.get("not_measured", other) for run, other in zip(runs, others, strict=True)), "–"])
    of = [run.get("architecture", {}) for run in runs]
    add("Speed-up, predicted", [found.get("predicted_speedup") for found in of], times)
    scores = [found.get("objective") for found in of]
    if len({run["metric"] for run in runs}) == 1:
        add("Sum of scores", scores, number)
    elif any(score is not None for score in scores):
        named = (f"{number(score)} ({run['metric']})" for score, run in zip(scores, runs, strict=True))
        rows.append(["Sum of scores", *named, "–"])
    for name, label in PREDICTED.items():
        values = [found.get("predicted", {}).get(name) for found in of]
        add(f"Predicted: {label}", values, count if name == "num_params" else number)
    for model in ("child", "child_before_gkd", "parent"):
        for key, label in FIGURES.items():
            if model != "child" and key not in QUALITY and (model, key) != ("parent", "throughput_tokens_per_s"):
                continue  # GKD changes no speed
            if model == "parent" and key in OF_PARENT:
                continue  # against itself
            values = [run["models"].get(model, {}).get(key) for run in runs]
            add(f"{MODEL_NAMES[model]}: {label}", values, lambda value, key=key: written_figure(key, value))
    return html_table(["", *NAMES, "B against A"], rows)


def _difference(a: float | None, b: float | None) -> str:
    """How far B is above A, as a share of A's size: a sum of scores may be below 0."""
    return percent((b - a) / abs(a), 1, sign=True) if a and b is not None else "–"


def _frontiers(runs: Sequence[Summary]) -> Html | None:
    """Both frontiers on one chart; by measured KL only where both have it."""
    if not any(run["frontier"] for run in runs):
        return None
    measured = all(all(point["kl"] is not None for point in run["frontier"]) for run in runs)
    metrics = {run["metric"] for run in runs}
    curves = [[(p["speedup"], p["kl"] if measured else p["objective"]) for p in run["frontier"]] for run in runs]
    if not measured and len(metrics) > 1:
        return note(f"The two runs score by {' and '.join(sorted(metrics))}, which have no common axis.")
    points: list[Point] = [(1.0, 0.0), *(point for curve in curves for point in curve)]
    right, high = max(x for x, _ in points), max(1e-9, *(y for _, y in points))
    left, low = min(x for x, _ in points), min(y for _, y in points)
    vertical = UNITS["kl"] if measured else f"sum of scores ({', '.join(UNITS.get(metric, metric) for metric in metrics)})"
    across, up = (left, right + 0.08 * (right - left or 1)), (low, low + 1.15 * (high - low))
    axes = Axes(across, up, "speed-up", vertical, width=720, height=340, x_unit=" ×")
    marks: list[Html] = []
    for name, curve, line, mark in zip(NAMES, curves, ("frontier-line", "second-line"), ("point", "second"), strict=True):
        ordered = sorted(curve)
        marks += [axes.line([(1.0, 0.0), *ordered], line)] if ordered else []
        marks += [axes.dot(p, mark, f"{name}: {number(p[0])} ×, {number(p[1])}") for p in ordered]
    key = legend(("point", f"A: {'measured KL' if measured else 'sum of scores'}"), ("second", "B"))
    return tag("figure", axes.draw(*marks, label=f"speed-up against {vertical}, both runs"), key, class_="wide")


def _architectures(runs: Sequence[Summary]) -> Html | None:
    """Layer by layer; bold where the two runs chose otherwise."""
    chosen = [run.get("architecture", {}).get("choices") for run in runs]
    if None in chosen:
        return None
    depth = max(len(choices) for choices in chosen)
    head = tag("tr", *(tag("th", text, scope="col") for text in ("layer", "A attention", "B attention", "A FFN", "B FFN")))
    rows, differing = [], 0
    for layer in range(depth):
        halves = [choices[layer] if layer < len(choices) else ["–", "–"] for choices in chosen]
        differs = halves[0] != halves[1]
        differing += differs
        cells = (tag("td", shown(halves[run][kind]), class_="text") for kind in (0, 1) for run in (0, 1))
        rows.append(tag("tr", tag("th", layer, scope="row"), *cells, class_="differs" if differs else None))
    table = tag("div", tag("table", tag("thead", head), tag("tbody", *rows), class_="words"), class_="scroll")
    return join([note(f"{differing} of {depth} layers differ; they are bold."), table])


def _samples(runs: Sequence[Summary]) -> Html | None:
    cards = []
    for name, run in zip(NAMES, runs, strict=True):
        for model, text in (run.get("samples") or {}).items():
            if model == "child" or name == "A":
                title = tag("h3", f"{name}: {MODEL_NAMES.get(model, model)}")
                cards.append(tag("div", title, tag("p", text, class_="sample"), class_="card"))
    return tag("div", *cards, class_="samples") if cards else None


def _settings(runs: Sequence[Summary]) -> Html:
    before, now = (dict(_flat(yaml.safe_load(run["config_yaml"]) or {})) for run in runs)
    rows = [
        [name, *(tag("td", values.get(name, "–"), class_="text") for values in (before, now))]
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    rows += [
        [f"version of {name}", *(tag("td", run["versions"].get(name, "–"), class_="text") for run in runs)]
        for name in dict.fromkeys([*runs[0]["versions"], *runs[1]["versions"]])
        if runs[0]["versions"].get(name) != runs[1]["versions"].get(name)
    ]
    return html_table(["setting", *NAMES], rows, class_="words") if rows else note("All settings and versions are the same.")


def _flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(settings, Mapping) and settings:
        for name, value in settings.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, str(settings)


def _stages(runs: Sequence[Summary]) -> Html | None:
    names = dict.fromkeys(name for run in runs for name in run["stage_seconds"])
    rows = [[name, *(_took(run["stage_seconds"].get(name)) for run in runs)] for name in names]
    return html_table(["stage", *NAMES], rows) if rows else None


def _took(seconds: float | None) -> str:
    return "–" if seconds is None else duration(seconds)
