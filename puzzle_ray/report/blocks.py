"""What is known of every variant: its damage, its costs, and how well it was distilled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from puzzle_ray.artifacts import KINDS, MIB, PARENT, ProfileRow, SubblockKind
from puzzle_ray.report.contents import KIND_NAMES, ReportData, TrainedVariant, shown
from puzzle_ray.report.markup import Html, count, damage, html_table, join, legend, note, number, percent, small, tag
from puzzle_ray.report.training import conditioning, distillation_details

Subblock = tuple[int, SubblockKind, str]


@dataclass(frozen=True)
class Heat:
    """One cell of a heat map."""

    value: float
    content: object
    tip: str


def heat_map(data: ReportData, cell: Callable[[int, SubblockKind, str], Heat | None], meaning: str) -> Html | None:
    """A heat map of layers (rows) and variants (columns), with colours on a log scale. The chosen variants are framed.

    None where no cell has a value.
    """
    heats: dict[Subblock, Heat] = {s: heat for s in _subblocks(data) if (heat := cell(*s))}
    if not heats:
        return None
    positive = [heat.value for heat in heats.values() if math.isfinite(heat.value) and heat.value > 0] or [1.0]
    scale = (min(positive), max(positive))
    columns = [(kind, list(dict.fromkeys(v for _, k, v in heats if k == kind))) for kind in KINDS]
    groups = [tag("th", KIND_NAMES[k], colspan=len(v), scope="colgroup", class_=k) for k, v in columns if v]
    names = [tag("th", shown(variant), scope="col") for _, variants in columns for variant in variants]
    head = tag("thead", tag("tr", tag("th", "layer", rowspan=2, scope="col"), *groups), tag("tr", *names))
    rows = []
    for layer in sorted({layer for layer, _, _ in heats}):
        cells = [
            _heat_cell(heats.get((layer, kind, v)), scale, framed=data.chosen(layer, kind) == v)
            for kind, variants in columns for v in variants
        ]  # fmt: skip
        rows.append(tag("tr", tag("th", layer, scope="row"), *cells))
    drawn = tag("div", tag("table", head, tag("tbody", *rows), class_="heat"), class_="scroll wide-map")
    key = tag("p", number(scale[0], 2), tag("i", class_="ramp"), f"{number(scale[1], 2)} {meaning}", class_="legend")
    return join([drawn, tag("div", key, legend(("frame", "chosen")) if data.architecture else None, class_="keys")])


def _heat_cell(heat: Heat | None, scale: tuple[float, float], framed: bool) -> Html:
    if heat is None:
        return tag("td", "–", class_="none")
    low, high = scale
    share = 0.0
    if math.isfinite(heat.value) and heat.value > 0 and high > low:
        share = math.log(heat.value / low) / math.log(high / low)
    return tag("td", heat.content, style=f"--heat:{100 * share:.0f}%", title=heat.tip, class_="framed" if framed else None)


def _subblocks(data: ReportData) -> list[Subblock]:
    """Every (layer, kind, variant) except the parent's own. From the search space or, without one, from scores and library."""
    if data.space:
        return list(data.space.subblocks())
    subblocks: dict[Subblock, None] = {}
    for row in data.scores.rows if data.scores else ():
        subblocks[row.layer, "attention", row.attention] = subblocks[row.layer, "ffn", row.ffn] = None
    for trained in data.library:
        subblocks[trained.layer, "attention" if trained.kind == "attention" else "ffn", trained.variant] = None
    return [s for s in subblocks if s[2] != PARENT]


def replace_one_damage(data: ReportData) -> list[Html] | None:
    """The replace-one score of every variant at every layer (arXiv 2411.19146 v5, section 4.2)."""

    def cell(layer: int, kind: SubblockKind, variant: str) -> Heat | None:
        value, row = data.score(layer, kind, variant), data.score_row(layer, kind, variant)
        if value is None:
            return None
        sure = f" ± {number(row.stderr, 2)} (standard error), {row.tokens} tokens" if row else ""
        if row and not row.tokens:
            sure = ", estimated from gradients, not scored"
        written = damage(value, data.metric, 2)
        shown_as = f"≈ {written}" if row and not row.tokens else written
        return Heat(value, shown_as, f"layer {layer}, {variant}: {damage(value, data.metric)}{sure}")

    drawn = heat_map(data, cell, data.unit)
    text = "The damage of replacing this one subblock, with everything else the parent's own. 0 is no damage. Colours on a log scale."
    if data.scores and any(row.metric == data.metric and not row.tokens for row in data.scores.rows):
        text += " ≈ marks estimates from gradients. They were not scored, since no architecture uses them."
    return [note(text), drawn] if drawn else None


def subblock_costs(data: ReportData) -> list[Html] | None:
    """The costs of every subblock shape."""
    profile = data.profile
    if profile is None or not profile.rows:
        return None
    many_types = len({row.layer_type for row in profile.rows if row.layer_type}) > 1
    many_batches = len(profile.batch_sizes) > 1
    parents = {(r.subblock, r.layer_type, r.batch_size): r for r in profile.rows if r.variant == PARENT}
    rows: list[list[object]] = []
    for row in profile.rows:
        name = [KIND_NAMES.get(row.subblock, row.subblock), shown(row.variant) if row.variant != row.subblock else ""]
        name += [row.layer_type if many_types else "", f"batch {row.batch_size}" if many_batches else ""]
        parent = parents.get((row.subblock, row.layer_type, row.batch_size))
        sizes = [number(row.weight_bytes / MIB), number(row.kv_bytes_per_token / 1024), count(row.num_params)]
        rows.append([" · ".join(part for part in name if part), *_times(row, parent, profile.estimated), *sizes])
    how = f"{data.engine} on {profile.device}, {profile.dtype}"
    text = f"Estimated, not measured: {how}." if profile.estimated else f"Measured: {how}; ± is half the inter-quartile range."
    scenario = f" Scenario: {data.serving}." if data.serving else ""
    header = ["subblock", "prefill, ms", "decode, ms a step", "weights, MiB", "KV cache, KiB a token", "params"]
    return [note(f"{text} Percentages are of the parent's subblock.{scenario}"), html_table(header, rows)]


def _times(row: ProfileRow, parent: ProfileRow | None, estimated: bool) -> list[Html]:
    """Prefill and decode, each with its spread and its share of the parent's."""
    cells = []
    for phase in ("prefill_ms", "decode_ms"):
        value, spread = getattr(row, phase), getattr(row, phase.replace("_ms", "_spread_ms"))
        whole = getattr(parent, phase) if parent and parent is not row else 0
        sure = "" if estimated or not spread else f" ± {number(spread, 2)}"
        cells.append(tag("td", number(value), small(sure), small(tag("b", percent(value / whole, 0)) if whole else "")))
    return cells


def block_distillation(data: ReportData) -> list[Html] | None:
    """Block distillation: the loss of every variant before and after, and its curve."""
    rows = {(row.layer, row.kind, row.variant): row for row in data.library}

    def cell(layer: int, kind: SubblockKind, variant: str) -> Heat | None:
        row = rows.get((layer, kind, variant))
        return _before_and_after(row) if row else None

    drawn = heat_map(data, cell, "normalised MSE")
    text = "Normalised MSE of the block's output on validation text, for the weights that were kept. 0 copies the parent. "
    text += "1 is as far off as an output of zeros. The small figure is the loss before training. Colours on a log scale."
    return [*([note(text), drawn] if drawn else []), *distillation_details(data)] or None


def _before_and_after(row: TrainedVariant) -> Heat:
    loss = row.start_loss if row.kept == "start" else row.final_loss
    below = f"from {number(row.start_loss, 2)}"
    if row.kept == "start":
        below = "failed" if row.failure else "start kept" if row.tokens else "untrained"
    tip = f"layer {row.layer}, {row.variant}: {number(row.start_loss)} ({row.initialisation})"
    tip += f", {number(row.final_loss)} after {row.tokens} tokens; kept: {row.kept}" if row.tokens else ", not trained"
    tip += f"; failed: {row.failure}" if row.failure else ""
    return Heat(loss, join([number(loss, 2), small(below)]), f"{tip}; {conditioning(row)}")
