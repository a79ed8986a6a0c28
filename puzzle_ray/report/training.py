"""Loss curves: of every variant's local distillation, and of the global one."""

from __future__ import annotations

import math

from puzzle_ray.report.charts import Axes, Point, binned
from puzzle_ray.report.contents import KIND_NAMES, ReportData
from puzzle_ray.report.markup import Html, legend, note, number, tag

PANEL_POINTS = 40  # per line: keeps the page of an 80-layer model small
GKD_POINTS = 200
GKD_TERMS = {"loss": "loss, the weighted sum", "kl": "KL", "cosine": "cosine distance", "lm": "next-token loss"}


def panels(data: ReportData) -> list[Html]:
    """Local distillation: one panel per variant, one line per layer, one scale for all. Empty without curves."""
    binned_curves = {key: binned(losses, PANEL_POINTS) for key, losses in data.bld_curves.items()}
    lines = {key: points for key, points in binned_curves.items() if len(points) > 1 and all(y > 0 for _, y in points)}
    if not lines:
        return []
    values = [y for points in lines.values() for _, y in points]
    scale = (min(values), max(max(values), 1.1 * min(values)))
    longest, last = max(len(data.bld_curves[key]) for key in lines), max(1, *(layer for layer, _, _ in lines))
    drawn = []
    for kind, variant in dict.fromkeys((kind, variant) for _, kind, variant in lines):
        axes = Axes((0, longest - 1), scale, "", "", width=260, height=150, log_y=True, left=48, top=8)
        own = [(layer, points) for (layer, k, v), points in lines.items() if (k, v) == (kind, variant)]
        paths = [axes.line(p, "depth", f"layer {i}: {_ends(p)}", f"--depth:{100 * i / last:.0f}%") for i, p in own]
        name = f"{KIND_NAMES[kind]} · {variant}"
        svg = axes.draw(*paths, label=f"training loss of {name}, by layer")
        drawn.append((kind != "attention", tag("figure", tag("figcaption", name), svg)))
    figures = [figure for _, figure in sorted(drawn, key=lambda x: x[0])]
    step = math.ceil(longest / PANEL_POINTS)
    mean = f"; a point is the mean of {step} micro-batches" if step > 1 else ""
    key = tag("p", "layer 0", tag("i", class_="ramp depth"), f"layer {last}", class_="legend")
    text = note(f"Normalised MSE (log scale) over micro-batches, one line per layer{mean}.")
    return [tag("h3", "Training loss"), text, tag("div", *figures, class_="panels"), key]


def gkd(data: ReportData) -> list[Html] | None:
    """Global distillation: the loss and its terms."""
    lines: list[tuple[str, str, list[Point]]] = []
    for key, name in GKD_TERMS.items():
        rows = [(row["step"], row[key]) for row in data.gkd_curve if math.isfinite(row.get(key, math.nan))]
        if len(rows) > 1:
            steps = binned([step for step, _ in rows], GKD_POINTS)
            losses = binned([loss for _, loss in rows], GKD_POINTS)
            lines.append((f"term-{key}", name, [(x, y) for (_, x), (_, y) in zip(steps, losses, strict=True)]))
    if not lines:
        return None
    xs, ys = zip(*(point for _, _, points in lines for point in points), strict=True)
    low, high, log_y = min(ys), max(ys), min(ys) > 0  # the terms differ by orders of magnitude
    scale = (low / 1.1, high * 1.1) if log_y else (min(0.0, low), max(high, 1e-9))
    label = "loss (log scale)" if log_y else "loss"
    axes = Axes((min(xs), max(*xs, min(xs) + 1)), scale, "step", label, width=720, height=300, log_y=log_y)
    drawn = [axes.line(points, class_, f"{name}: {_ends(points)}") for class_, name, points in lines]
    key_entries = [(class_, f"{name}: {_ends(points)}") for class_, name, points in lines]
    return [tag("figure", axes.draw(*drawn, label="loss by step"), legend(*key_entries), class_="wide")]


def _ends(points: list[Point]) -> str:
    return f"{number(points[0][1])} → {number(points[-1][1])}"
