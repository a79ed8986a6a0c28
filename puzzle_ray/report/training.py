"""Loss curves of block distillation (BLD) and of global distillation (GKD)."""

from __future__ import annotations

import math

from puzzle_ray.artifacts import BLOCK
from puzzle_ray.report.charts import Axes, Point, binned
from puzzle_ray.report.contents import KIND_NAMES, ReportData
from puzzle_ray.report.markup import Html, count, html_table, legend, note, number, percent, tag

PANEL_POINTS = 40  # per line; this keeps the page of an 80-layer model small
GKD_POINTS = 200
GKD_TERMS = {"loss": "loss, the weighted sum", "kl": "KL", "cosine": "cosine distance", "lm": "next-token loss"}


def distillation_details(data: ReportData) -> list[Html]:
    """Block distillation: a table of coupled pairs, what early stops saved, and the loss curves."""
    return [*_pairs(data), *_early_stops(data), *_curves(data)]


def _pairs(data: ReportData) -> list[Html]:
    """Losses before and after, for pairs that were trained together."""
    rows = [row for row in data.library if row.kind == BLOCK]
    if not rows:
        return []
    chosen = {(i, choice.label) for i, choice in enumerate(data.architecture.choices)} if data.architecture else set()
    lines = []
    for row in rows:
        kept = f"start: {row.failure}" if row.failure else row.kept
        mark = " (chosen)" if (row.layer, row.variant) in chosen else ""
        name = f"layer {row.layer} · {row.variant}{mark}"
        lines.append([name, number(row.start_loss), number(row.final_loss), count(row.tokens), kept])
    text = "Pairs whose halves were trained together (coupled). Normalised MSE of the block's output on validation text."
    return [note(text), html_table(["pair", "before", "after", "tokens", "kept"], lines)]


def _early_stops(data: ReportData) -> list[Html]:
    """How many variants were stopped because their loss was flat, and what that saved."""
    stopped = [row for row in data.library if row.tokens_saved]
    if not stopped:
        return []
    trained = [row for row in data.library if row.tokens]
    saved = sum(row.tokens_saved for row in stopped)
    share = percent(saved / (saved + sum(row.tokens for row in trained)))
    text = f"{len(stopped)} of {len(trained)} stopped early, since their loss was flat. {count(saved)} tokens were saved, {share} of the"
    return [note(f"{text} training. They keep the weights of that moment, without the rest of the learning rate's decay.")]


def _curves(data: ReportData) -> list[Html]:
    """One panel per variant with a line per layer, or one per layer with a line per coupled pair. All have one scale."""
    binned_curves = {key: binned(losses, PANEL_POINTS) for key, losses in data.bld_curves.items()}
    lines = {key: points for key, points in binned_curves.items() if len(points) > 1 and all(y > 0 for _, y in points)}
    if not lines:
        return []
    values = [y for points in lines.values() for _, y in points]
    scale = (min(values), max(max(values), 1.1 * min(values)))
    longest, last = max(len(data.bld_curves[key]) for key in lines), max(1, *(layer for layer, _, _ in lines))
    by_panel: dict[tuple[bool, str], list[tuple[int, str, list[Point]]]] = {}
    for (layer, kind, variant), points in lines.items():
        if kind == BLOCK:
            by_panel.setdefault((False, f"layer {layer}"), []).append((layer, variant, points))
        else:
            name = f"{KIND_NAMES[kind]} · {variant}"
            by_panel.setdefault((kind != "attention", name), []).append((layer, f"layer {layer}", points))
    figures = []
    for (_, name), own in sorted(by_panel.items(), key=lambda panel: panel[0][0]):
        axes = Axes((0, longest - 1), scale, "", "", width=260, height=150, log_y=True, left=48, top=8)
        paths = [axes.line(p, "depth", f"{what}: {_ends(p)}", f"--depth:{100 * i / last:.0f}%") for i, what, p in own]
        figures.append(tag("figure", tag("figcaption", name), axes.draw(*paths, label=f"training loss of {name}")))
    step = math.ceil(longest / PANEL_POINTS)
    mean = f"; a point is the mean of {step} micro-batches" if step > 1 else ""
    key = tag("p", "layer 0", tag("i", class_="ramp depth"), f"layer {last}", class_="legend")
    each = "pair" if any(kind == BLOCK for _, kind, _ in lines) else "layer"
    text = note(f"Training loss (log scale) over micro-batches, one line per {each}{mean}.")
    return [tag("h3", "Training loss"), text, tag("div", *figures, class_="panels"), key]


def global_distillation(data: ReportData) -> list[Html] | None:
    """Global distillation (GKD): the loss and its terms."""
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
