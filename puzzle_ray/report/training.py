"""The page's sections about scores and training, and what the child writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from puzzle_ray.artifacts import KINDS, PARENT, SubblockKind
from puzzle_ray.report.charts import Axes, binned, curves
from puzzle_ray.report.contents import ReportData, TrainedVariant
from puzzle_ray.report.markup import Html, duration, join, legend, note, number, small, table, tag
from puzzle_ray.report.sections import KIND_NAMES, MODEL_NAMES

CURVE_POINTS = 40  # per line of the BLD panels: keeps an 80-layer page small


@dataclass(frozen=True)
class Heat:
    """One cell of a heat map."""

    value: float
    content: object
    tip: str


def heat_map(data: ReportData, cell: Callable[[int, SubblockKind, str], Heat | None], meaning: str) -> Html | None:
    """Layers down, variants across, colour on a log scale; the chosen variants are framed. None where no cell has a value."""
    found: dict[tuple[int, SubblockKind, str], Heat] = {}
    for layer, kind, variant in _subblocks(data):
        made = cell(layer, kind, variant)
        if made is not None:
            found[layer, kind, variant] = made
    positive = [c.value for c in found.values() if math.isfinite(c.value) and c.value > 0]
    if not found:
        return None
    low, high = (min(positive), max(positive)) if positive else (1.0, 1.0)
    columns = {kind: list(dict.fromkeys(v for _, k, v in found if k == kind)) for kind in KINDS}
    groups = [tag("th", KIND_NAMES[k], colspan=len(v), scope="colgroup", class_=k) for k, v in columns.items() if v]
    head = [tag("tr", tag("th", "layer", rowspan=2, scope="col"), *groups)]
    head.append(tag("tr", *(tag("th", v, scope="col") for kind in KINDS for v in columns[kind])))
    rows = []
    for layer in sorted({layer for layer, _, _ in found}):
        cells = [tag("th", layer, scope="row")]
        for kind in KINDS:
            cells += [_heat_cell(data, layer, kind, v, found.get((layer, kind, v)), low, high) for v in columns[kind]]
        rows.append(tag("tr", *cells))
    drawn = tag("table", tag("thead", *head), tag("tbody", *rows), class_="heat")
    scale = tag("p", number(low, 2), tag("i", class_="ramp"), f"{number(high, 2)} {meaning}", class_="legend")
    frame = legend(("frame", "chosen")) if data.architecture else None
    return join([tag("div", drawn, class_="scroll"), tag("div", scale, frame, class_="keys")])


def _heat_cell(
    data: ReportData, layer: int, kind: SubblockKind, variant: str, cell: Heat | None, low: float, high: float
) -> Html:
    if cell is None:
        return tag("td", "–", class_="none")
    heat = 0.0
    if math.isfinite(cell.value) and cell.value > 0 and high > low:
        heat = math.log(cell.value / low) / math.log(high / low)
    chosen = data.chosen(layer, kind) == variant
    return tag("td", cell.content, style=f"--heat:{100 * heat:.0f}%", title=cell.tip, class_="framed" if chosen else None)


def _subblocks(data: ReportData) -> list[tuple[int, SubblockKind, str]]:
    """Every (layer, kind, variant) but the parent's, from the search space or, without one, from scores and library."""
    if data.space:
        return list(data.space.subblocks())
    seen: dict[tuple[int, SubblockKind, str], None] = {}
    for row in data.scores.rows if data.scores else ():
        for kind, variant in ((KINDS[0], row.attention), (KINDS[1], row.ffn)):
            if variant != PARENT:
                seen[row.layer, kind, variant] = None
    for trained in data.library:
        seen[trained.layer, _kind_of(trained), trained.variant] = None
    return list(seen)


def _kind_of(row: TrainedVariant) -> SubblockKind:
    return "attention" if row.kind == "attention" else "ffn"


def scores(data: ReportData) -> list[Html] | None:
    """Damage of every variant at every layer."""

    def cell(layer: int, kind: SubblockKind, variant: str) -> Heat | None:
        value, row = data.score(layer, kind, variant), data.score_row(layer, kind, variant)
        if value is None:
            return None
        sure = f" ± {number(row.stderr, 2)} (standard error), {row.tokens} tokens" if row else ""
        return Heat(value, number(value, 2), f"layer {layer}, {variant}: {number(value)}{sure}")

    drawn = heat_map(data, cell, data.unit)
    if drawn is None:
        return None
    return [note("Damage when this one subblock is replaced and the rest stays the parent's. 0 is none."), drawn]


def distillation(data: ReportData) -> list[Html] | None:
    """Blockwise local distillation: loss before and after for every variant, and its course."""
    rows = {(r.layer, r.kind, r.variant): r for r in data.library}

    def cell(layer: int, kind: SubblockKind, variant: str) -> Heat | None:
        r = rows.get((layer, kind, variant))
        if r is None:
            return None
        kept = r.start_loss if r.kept == "start" else r.final_loss
        tip = f"layer {layer}, {variant}: {number(r.start_loss)} from {r.initialisation}, {number(r.final_loss)} after {r.tokens} tokens"
        tip += f"; kept: {r.kept}" + (f"; failed: {r.failure}" if r.failure else "")
        untrained = r.tokens == 0
        under = "failed" if r.failure else "untrained" if untrained else "start kept" if r.kept == "start" else f"from {number(r.start_loss, 2)}"
        return Heat(kept, join([number(kept, 2), small(under)]), tip)

    table_of_losses = heat_map(data, cell, "normalised MSE") if rows else None
    panels = _panels(data) if data.bld_curves else None
    if table_of_losses is None and panels is None:
        return None
    text = "Normalised MSE of the block's output on validation text, of the weights kept: 0 copies the parent, 1 is as bad as writing zeros."
    return [*([note(text), table_of_losses] if table_of_losses else []), *(panels or [])]


def _panels(data: ReportData) -> list[Html]:
    """One panel per variant, one line per layer, one scale for all."""
    lines = {key: binned(losses, CURVE_POINTS) for key, losses in data.bld_curves.items()}
    lines = {key: points for key, points in lines.items() if len(points) > 1}
    values = [y for points in lines.values() for _, y in points if y > 0]
    if not values:
        return []
    longest = max(len(losses) for losses in data.bld_curves.values())
    scale = (min(values), max(max(values), min(values) * 1.01))
    last = max(layer for layer, _, _ in lines) or 1
    panels = []
    for kind, variant in sorted({(k, v) for _, k, v in lines}, key=lambda key: _order(data, *key)):
        axes = Axes((0, max(longest - 1, 1)), scale, "", "", width=260, height=150, log_y=True, left=50, top=8)
        drawn = [
            axes.line(points, "depth", f"layer {layer}: {number(points[0][1])} → {number(points[-1][1])}", f"--depth:{100 * layer / last:.0f}%")
            for (layer, k, v), points in lines.items() if (k, v) == (kind, variant)
        ]  # fmt: skip
        name = f"{KIND_NAMES[kind]} · {variant}"
        panels.append(tag("figure", tag("figcaption", name), axes.draw(*drawn, label=f"training loss of {name} by layer")))
    step = math.ceil(longest / CURVE_POINTS)
    mean = f", each point the mean of {step} micro-batches" if step > 1 else ""
    scale_key = tag("p", "layer 0", tag("i", class_="ramp depth"), f"layer {last}", class_="legend")
    return [tag("h3", "Training loss"), note(f"Normalised MSE (log scale) over micro-batches{mean}."),
            tag("div", *panels, class_="panels"), scale_key]


def _order(data: ReportData, kind: str, variant: str) -> tuple[int, int, str]:
    """Attention first, then as the search space lists them."""
    known = [v for _, k, v in (data.space.subblocks() if data.space else ()) if k == kind]
    return int(kind != "attention"), known.index(variant) if variant in known else len(known), variant


GKD_TERMS = {"loss": "loss (weighted sum)", "kl": "KL term", "cosine": "cosine term", "lm": "LM term"}


def gkd(data: ReportData) -> list[Html] | None:
    """Global distillation's loss."""
    rows = [row for row in data.gkd_curve if "step" in row]
    lines = []
    for key, name in GKD_TERMS.items():
        pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]
        if len(pairs) > 1:
            points = binned([y for _, y in pairs], 200)
            first, stride = pairs[0][0], (pairs[-1][0] - pairs[0][0]) / (len(pairs) - 1)
            lines.append((f"term-{key}", name, [(first + stride * x, y) for x, y in points]))
    if not lines:
        return None
    drawn = curves(lines, "step", "loss", "distillation loss by step")
    ends = [(class_, f"{name}: {number(points[0][1])} → {number(points[-1][1])}") for class_, name, points in lines]
    return [tag("figure", drawn, legend(*ends))]


def samples(data: ReportData) -> list[Html] | None:
    """Greedy continuations side by side."""
    texts: Mapping[str, str] = (data.evaluation or {}).get("samples") or {}
    if not texts:
        return None
    prompt = str((data.evaluation or {}).get("prompt") or "")
    cards = []
    for name, sample in texts.items():
        begins = bool(prompt) and sample.startswith(prompt)
        shown = [tag("b", prompt), sample[len(prompt):]] if begins else [sample]
        cards.append(tag("div", tag("h3", MODEL_NAMES.get(name, name)), tag("p", *shown, class_="sample"), class_="card"))
    return [tag("div", *cards, class_="columns")]


def stages(data: ReportData) -> list[Html] | None:
    """Where the time went."""
    if not data.stage_seconds:
        return None
    longest, total = max(data.stage_seconds.values()) or 1.0, sum(data.stage_seconds.values())
    rows: list[list[object]] = [
        [name, tag("td", tag("i", tag("b", style=f"width:{100 * s / longest:.1f}%"), class_="bar")), duration(s)]
        for name, s in data.stage_seconds.items()
    ]
    rows.append(["all", "", duration(total)])
    return [table(["stage", "", "time"], rows, class_="stages")]


def settings(data: ReportData) -> list[Html] | None:
    """What it takes to run it again."""
    parts = []
    for title, facts in (("Versions", data.versions), ("Machine", data.machine)):
        if facts:
            parts.append(tag("details", tag("summary", title), table(["", ""], [[k, str(v)] for k, v in facts.items()], class_="facts")))
    if data.config_yaml:
        parts.insert(0, tag("details", tag("summary", "Configuration"), tag("pre", data.config_yaml)))
    return parts or None
