"""The search's answer: the frontier over budgets, and the chosen architecture as a picture."""

from __future__ import annotations

import math
from collections import Counter

from puzzle_ray.artifacts import KINDS, PARENT, Architecture, SubblockKind
from puzzle_ray.report.charts import Axes
from puzzle_ray.report.contents import KIND_NAMES, ReportData, SweepPoint, runtime_ms, shown
from puzzle_ray.report.markup import Html, count, css_width, duration, html_table, legend, note, number, percent, tag, times

ORIGIN = (1.0, 0.0)  # the parent: its own speed, no damage


def frontier(data: ReportData) -> list[Html] | None:
    """Speed-up against the sum of scores for every budget of the sweep, and the same as a table."""
    answers = [(p.asked, p.architecture) for p in data.sweep if p.architecture]
    if not data.sweep and data.architecture is None:
        return None
    rows = [_sweep_row(asked, a) for asked, a in answers]
    for point, reason in _refused(data):
        rows.append([point.asked, tag("td", f"none: {reason}", colspan=5, class_="text")])
    header = ["asked", data.costs_are, "sum of scores", "proven", "params", "MiB"]
    found = html_table(header, rows) if rows else None
    chart = _frontier_chart(data) if answers or data.architecture else None
    return [tag("div", chart, tag("div", found, _search_facts(data)), class_="columns")]


def _refused(data: ReportData) -> list[tuple[SweepPoint, str]]:
    return [(p, p.infeasible_reason or "no architecture found") for p in data.sweep if not p.architecture]


def _frontier_chart(data: ReportData) -> Html:
    answers = sorted(((p.architecture, p.asked) for p in data.sweep if p.architecture), key=lambda x: _place(x[0]))
    places = [ORIGIN, *(_place(a) for a, _ in answers), *([_place(data.architecture)] if data.architecture else [])]
    left, right = min(x for x, _ in places), max(1.2, *(x for x, _ in places))
    low, high = min(y for _, y in places), max(1e-9, *(y for _, y in places))
    axes = Axes(
        (left, right + 0.08 * (right - left)), (low, low + 1.15 * (high - low)),
        f"{data.costs_are} speed-up over the parent", f"sum of scores ({data.unit})", x_unit=" ×",
    )  # fmt: skip
    marks = [axes.line([ORIGIN, *(_place(a) for a, _ in answers)], "frontier-line")] if answers else []
    marks.append(axes.dot(ORIGIN, "parent-dot", "the parent"))
    for a, asked in answers:
        marks.append(axes.dot(_place(a), "point", f"asked {asked}: {_described(data, a)}"))
    if data.architecture:
        marks.append(axes.dot(_place(data.architecture), "chosen-dot", f"chosen: {_described(data, data.architecture)}", 8))
        marks.append(axes.caption(_place(data.architecture), "chosen", -14, -4, anchor="end", class_="strong"))
    for point, reason in _refused(data):  # far ones, and those that asked for no speed-up, stand at the right edge
        place = min(point.speedup_asked or axes.x[1], axes.x[1])
        marks.append(axes.cross((place, axes.y[1]), f"asked {point.asked}: {reason}"))
    key = [("origin", "parent"), *([("point", "answer to a budget")] if answers else [])]
    key += [("chosen", "chosen")] if data.architecture else []
    key += [("refused", "asked, but no architecture reaches it")] if _refused(data) else []
    return tag("figure", axes.draw(*marks, label=f"{data.costs_are} speed-up against sum of scores"), legend(*key))


def _place(a: Architecture) -> tuple[float, float]:
    return a.predicted_speedup, a.objective


def _described(data: ReportData, a: Architecture) -> str:
    return f"{data.costs_are} {number(a.predicted_speedup)} ×, sum of scores {number(a.objective)}, {a.status}"


def _sweep_row(asked: str, a: Architecture) -> list[object]:
    proven = "optimal" if a.status == "optimal" else a.status if a.status == "heuristic" else f"gap {percent(a.gap)}"
    costs = [count(a.predicted.num_params), number(a.predicted.memory_mib)]
    return [asked, times(a.predicted_speedup), number(a.objective), proven, *costs]


def _search_facts(data: ReportData) -> Html | None:
    a = data.architecture
    if a is None:
        return None
    asked = ", ".join(f"{name} {value:g}" for name, value in a.limits.items())
    architectures = data.space.size if data.space else 0.0
    exponent = math.floor(math.log10(architectures)) if 0 < architectures < math.inf else None
    size = (
        [f" among {architectures / 10**exponent:.1f} × 10", tag("sup", exponent), " architectures"]
        if exponent is not None
        else []
    )
    proof = "proven optimal" if a.status == "optimal" else f"{a.status}, at least {number(a.bound, 4)} (gap {percent(a.gap)})"
    proof = "a heuristic's, nothing proven" if a.status == "heuristic" else proof
    took = f" in {duration(a.solve_s)}" + (f"; asked: {asked}" if asked else "")
    return note(f"Chosen by {a.searcher}", *size, took, f". Sum of scores {number(a.objective, 4)}: {proof}.")


def architecture(data: ReportData) -> list[Html] | None:
    """One row per layer; attention grows to the left of the layer's number, the FFN to its right; outlines are the parent."""
    if data.architecture is None:
        return None
    layers = range(len(data.architecture.choices))
    runtimes = {i: pair for i in layers if (pair := _runtimes_ms(data, i))}
    head = tag("tr", *(tag("th", h, scope="col") for h in ("Attention", "layer", "FFN", *(["time"] if runtimes else []))))
    rows = []
    for i in layers:
        attention, ffn = tag("td", _box(data, i, "attention"), class_="left"), tag("td", _box(data, i, "ffn"))
        time = _time(data, i, *runtimes[i]) if i in runtimes else tag("td") if runtimes else None
        rows.append(tag("tr", attention, tag("th", i, scope="row"), ffn, time))
    picture = tag("table", tag("thead", head), tag("tbody", *rows), class_="arch dense" if len(layers) > 40 else "arch")
    chosen = {choice.variant(kind) for choice in data.architecture.choices for kind in KINDS}
    key = [("attention", "attention kept"), ("ffn", "FFN kept")]
    key += [k for k in (("linear", "linear layer"), ("noop", "no-op: nothing left")) if k[0] in chosen]
    text = "Outlines are the parent. Filled: the share of KV heads (attention) or channels (FFN) that is kept"
    text += "; of other variants, the share of the parameters." if chosen - {PARENT, "noop"} else "."
    if runtimes:
        text += f" Time: the layer's {data.costs_are} runtime as a share of the parent's."
    counts = (tag("p", tag("b", KIND_NAMES[kind], ": "), _counts(data.architecture, kind), class_="counts") for kind in KINDS)
    return [*counts, tag("figure", picture, legend(*key)), note(text)]


def _counts(a: Architecture, kind: SubblockKind) -> str:
    found = Counter(choice.variant(kind) for choice in a.choices)
    return ", ".join(f"{n} × {shown(variant)}" for variant, n in found.most_common())


def _runtimes_ms(data: ReportData, layer: int) -> tuple[float, float] | None:
    """A layer's (child, parent) runtime by the profile."""
    own = [data.cost(layer, kind, data.chosen(layer, kind) or PARENT) for kind in KINDS]
    parent = [data.cost(layer, kind, PARENT) for kind in KINDS]
    if None in own or None in parent:
        return None
    whole = sum(runtime_ms(cost) for cost in parent if cost)
    return (sum(runtime_ms(cost) for cost in own if cost), whole) if whole > 0 else None


def _time(data: ReportData, layer: int, own_ms: float, parent_ms: float) -> Html:
    tip = f"layer {layer}: {number(own_ms)} ms of the parent's {number(parent_ms)} ms ({data.costs_are})"
    bar = tag("i", tag("b", style=css_width(own_ms / parent_ms)), class_="bar")
    return tag("td", bar, percent(own_ms / parent_ms, 0), title=tip, class_="time")


def _box(data: ReportData, layer: int, kind: SubblockKind) -> Html:
    variant = data.chosen(layer, kind) or PARENT
    head, kept = variant.partition(":")[0], data.share_kept(layer, kind, variant)
    colour = head if head in ("linear", "noop") else kind if head in (PARENT, "gqa", "ffn") else "other"
    fill = tag("i", class_=colour, style=css_width(kept)) if kept else None
    share = f" · {percent(kept, 0)}" if kept is not None and variant not in (PARENT, "noop") else None
    text = tag("span", shown(variant), share and tag("em", share))
    title = "\n".join(_facts(data, layer, kind, variant, kept))
    return tag("div", fill, text, class_="box is-noop" if variant == "noop" else "box", title=title)


def _facts(data: ReportData, layer: int, kind: SubblockKind, variant: str, kept: float | None) -> list[str]:
    """The lines of a box's tooltip."""
    facts = [f"layer {layer}, {KIND_NAMES[kind]}: {variant}"]
    if kept is not None and variant.startswith(("gqa:", "ffn:")):
        facts.append(f"{percent(kept)} of the {'KV heads' if kind == 'attention' else 'channels'} kept")
    score, cost, parent = data.score(layer, kind, variant), data.cost(layer, kind, variant), data.cost(layer, kind, PARENT)
    if score is not None and variant != PARENT:
        facts.append(f"score {number(score)} ({data.unit})")
    if cost and parent:
        facts.append(f"runtime {number(runtime_ms(cost))} ms of {number(runtime_ms(parent))} ms ({data.costs_are})")
        facts.append(f"{count(cost.num_params)} of {count(parent.num_params)} parameters")
    return facts
