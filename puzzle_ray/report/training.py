"""Loss curves of block distillation (BLD) and of global distillation (GKD)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from puzzle_ray.artifacts import BLOCK
from puzzle_ray.distill.outliers import FAR_ABOVE, stands_out
from puzzle_ray.distill.summary import gkd_summary
from puzzle_ray.report.charts import Axes, Point, binned
from puzzle_ray.report.contents import KIND_NAMES, ReportData, TrainedVariant
from puzzle_ray.report.markup import Html, count, html_table, legend, note, number, percent, tag

PANEL_POINTS = 40  # per line; this keeps the page of an 80-layer model small
GKD_POINTS = 200
GKD_TERMS = {"loss": "loss, the weighted sum", "kl": "KL", "cosine": "cosine distance", "lm": "next-token loss"}


def distillation_details(data: ReportData) -> list[Html]:
    """Block distillation: tables of coupled pairs and of what stands out, what early stops saved, and the loss curves."""
    return [*_pairs(data), *_outliers(data), *_early_stops(data), *_curves(data)]


def conditioning(row: TrainedVariant) -> str:
    """The norms and the sensitivity of a variant, in words."""
    values = f"largest singular value {number(row.singular_value)} (parent {number(row.parent_singular_value)})"
    return f"{values}, sensitivity {row.sensitivity:.2g} (parent {row.parent_sensitivity:.2g})"


def _outliers(data: ReportData) -> list[Html]:
    """Variants that are less well-conditioned than the parent; where there are none, that there are none."""
    if not any(row.parent_sensitivity for row in data.library):
        return []
    explained = (
        "The largest singular value of the matrix that is furthest above the parent's, and the sensitivity: the rise of the "
    )
    explained += "block's loss under a random relative change of 1e-3 of its input. Beside them the parent's own."
    lines = []
    for row in data.library:
        if stands_out(row):
            values = [number(row.singular_value), number(row.parent_singular_value)]
            changes = [f"{row.sensitivity:.2g}", f"{row.parent_sensitivity:.2g}"]
            lines.append(
                [f"layer {row.layer} · {KIND_NAMES.get(row.kind, 'Pair')} · {row.variant}", *values, *changes, row.initialisation]
            )
    if not lines:
        none = f"No variant has a singular value above {FAR_ABOVE:g} times the parent's, or a sensitivity above {FAR_ABOVE**2:g} times."
        return [note(f"{none} Each cell above says its own.")]
    header = ["less well-conditioned than the parent", "singular value", "parent's", "sensitivity", "parent's", "start"]
    return [note(explained), html_table(header, lines)]


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
        changes = [f"{number(row.singular_value)} ({number(row.parent_singular_value)})"]
        changes += [f"{row.sensitivity:.2g} ({row.parent_sensitivity:.2g})"]
        lines.append([name, number(row.start_loss), number(row.final_loss), *changes, count(row.tokens), kept])
    text = "Pairs whose halves were trained together (coupled). Normalised MSE of the block's output on validation text."
    text += " Singular value: the largest of the matrix furthest above the parent's. Sensitivity: the rise of the loss under a random "
    text += "relative change of 1e-3 of the input. The parent's are in brackets."
    return [note(text), html_table(["pair", "before", "after", "singular value", "sensitivity", "tokens", "kept"], lines)]


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
        axes = Axes((0, longest - 1), scale, "", "", width=260, height=150, log_y=True, top=8)
        paths = [axes.line(p, "depth", f"{what}: {_ends(p)}", f"--depth:{100 * i / last:.0f}%") for i, what, p in own]
        figures.append(tag("figure", tag("figcaption", name), axes.draw(*paths, label=f"training loss of {name}")))
    step = math.ceil(longest / PANEL_POINTS)
    mean = f"; a point is the mean of {step} steps" if step > 1 else ""
    key = tag("p", "layer 0", tag("i", class_="ramp depth"), f"layer {last}", class_="legend")
    each = "pair" if any(kind == BLOCK for _, kind, _ in lines) else "layer"
    text = note(f"Training loss (log scale) over optimizer steps, one line per {each}{mean}.")
    return [tag("h3", "Training loss"), text, tag("div", *figures, class_="panels"), key]


def global_distillation(data: ReportData) -> list[Html] | None:
    """Global distillation (GKD): what came of it in a line, the range test, and the loss and its terms."""
    said = gkd_summary(data.gkd_facts)
    lines = [*([f"{said[0].upper()}{said[1:]}."] if said else []), *_unwatched_and_worse(data)]
    return [*map(note, lines), *_range_test(data), *_gkd_curves(data)] or None


def _unwatched_and_worse(data: ReportData) -> list[str]:
    """What the evaluation says of a training that nothing watched: where it was watched, it publishes no child that is worse."""
    before, after = (data.models.get(name, {}).get("kl") for name in ("child_before_gkd", "child"))
    if not data.gkd_facts or "kept" in data.gkd_facts or before is None or after is None or after <= before:
        return []
    text = f"The child is worse than before: its KL to the parent rose from {number(before)} to {number(after)}. Training was not watched"
    return [f"{text} on held-out text (gkd.heldout_tokens: 0); with it, such a child is published as it was."]


def _range_test(data: ReportData) -> list[Html]:
    """The learning rates that were tried, where the rate was chosen by a range test."""
    trials = data.gkd_facts.get("range_test") or ()
    if not trials:
        return []
    rows: list[list[object]] = []
    for trial in sorted(trials, key=lambda trial: float(trial["rate"])):
        chosen = " (chosen)" if trial["rate"] == data.gkd_facts["learning_rate"] else ""
        kl = "not finite" if trial["kl"] is None else number(trial["kl"])
        rows.append([f"{trial['rate']:g}{chosen}", count(trial["steps"]), kl])
    return [html_table(["learning rate tried", "steps", "held-out KL"], rows)]


def _gkd_curves(data: ReportData) -> list[Html]:
    lines: list[tuple[str, str, list[Point]]] = []
    for key, name in GKD_TERMS.items():
        rows = [(row["step"], row[key]) for row in data.gkd_curve if math.isfinite(row.get(key, math.nan))]
        if len(rows) > 1:
            steps = binned([step for step, _ in rows], GKD_POINTS)
            losses = binned([loss for _, loss in rows], GKD_POINTS)
            lines.append((f"term-{key}", name, [(x, y) for (_, x), (_, y) in zip(steps, losses, strict=True)]))
    looks = _looks(data.gkd_looks)
    if len(looks) > 1 and lines:
        lines.append(("term-heldout", "KL on held-out text", looks))
    if not lines:
        return []
    xs, ys = zip(*(point for _, _, points in lines for point in points), strict=True)
    low, high, log_y = min(ys), max(ys), min(ys) > 0  # the terms differ by orders of magnitude
    scale = (low / 1.1, high * 1.1) if log_y else (min(0.0, low), max(high, 1e-9))
    label = "loss (log scale)" if log_y else "loss"
    axes = Axes((min(xs), max(*xs, min(xs) + 1)), scale, "step", label, width=720, height=300, log_y=log_y)
    drawn = [axes.line(points, class_, f"{name}: {_ends(points)}") for class_, name, points in lines]
    key_entries = [(class_, f"{name}: {_ends(points)}") for class_, name, points in lines]
    return [tag("figure", axes.draw(*drawn, label="loss by step"), legend(*key_entries), class_="wide")]


def _looks(rows: Sequence[Mapping[str, float]]) -> list[Point]:
    """(step, KL) of the looks at held-out text, without those behind the best one where training went back to it, or gave up."""
    path: list[Point] = []
    for row in rows:
        if row["returned"]:
            best = min(path, key=lambda look: (look[1], look[0]), default=None)
            path = path[: path.index(best) + 1] if best else []
        elif math.isfinite(row["kl"]):
            path.append((row["step"], row["kl"]))
    return path


def _ends(points: list[Point]) -> str:
    return f"{number(points[0][1])} → {number(points[-1][1])}"
