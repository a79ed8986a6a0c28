"""The search's result: accuracy against speed over all budgets, and the chosen architecture as a picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from puzzle_ray.artifacts import KINDS, PARENT, Architecture, LayerChoice, SubblockKind
from puzzle_ray.report.charts import Axes
from puzzle_ray.report.contents import KIND_NAMES, UNITS, ReportData, SweepPoint, runtime_ms, shown
from puzzle_ray.report.markup import (
    Html,
    count,
    css_width,
    damage,
    duration,
    html_table,
    legend,
    nats,
    note,
    number,
    percent,
    tag,
    times,
)
from puzzle_ray.report.points import all_details, opens, point_details

ORIGIN = (1.0, 0.0)  # the parent: its own speed, no damage


@dataclass(frozen=True)
class Answer:
    """An architecture on the chart of accuracy against speed: the answer to one budget, or the chosen one (`asked` is empty).

    `kl` is the KL of the whole child where it was measured. `distilled_kl` is its KL after GKD.
    """

    architecture: Architecture
    asked: str = ""
    kl: float | None = None
    distilled_kl: float | None = None

    @property
    def speedup(self) -> float:
        return self.architecture.predicted_speedup

    @property
    def damage(self) -> float:
        """The measured KL, or the sum of scores where it was not measured."""
        return self.architecture.objective if self.kl is None else self.kl

    @property
    def place(self) -> tuple[float, float]:
        return self.speedup, self.damage


def frontier(data: ReportData) -> list[Html] | None:
    """Accuracy against speed for every budget of the sweep, as a chart and as a table."""
    if not data.sweep and data.architecture is None:
        return None
    answers = _answers(data)
    measured, distilled = any(a.kl is not None for a in answers), any(a.distilled_kl is not None for a in answers)
    header = ["asked", data.costs_are, "sum of scores", *(["measured KL"] if measured else [])]
    batches = (
        len({size for a in answers for size in (a.architecture.predicted.batch_size, a.architecture.parent_predicted.batch_size)})
        > 1
    )
    header += [*(["KL after GKD"] if distilled else []), "proven", *(["batch"] if batches else []), "params", "MiB"]
    rows = [_sweep_row(a, measured, distilled, batches) for a in answers]
    for point, reason in _infeasible(data):
        rows.append([point.asked, tag("td", f"none: {reason}", colspan=len(header) - 1, class_="text")])
    sweep = html_table(header, rows, class_="budgets") if rows else None
    chart = _frontier_chart(data, answers) if answers or data.architecture else None
    drawn = tag("div", chart, tag("div", sweep, _search_facts(data)), class_="columns")
    return [drawn, *([details] if (details := _point_details(data, answers)) else [])]


def _point_details(data: ReportData, all_answers: Sequence[Answer]) -> Html | None:
    """A box for every point of the chart, in its order, and one for the chosen architecture."""
    answers, chosen = _drawn(data, all_answers), _chosen_answer(data, all_answers)
    named = [(f"asked {a.asked}", a) for a in answers] + ([("chosen", chosen)] if chosen else [])
    boxes = [point_details(n, title, a.architecture, data.costs_are, a.kl, a.distilled_kl) for n, (title, a) in enumerate(named)]
    return all_details(boxes)


def _answers(data: ReportData) -> list[Answer]:
    return [Answer(p.architecture, p.asked, data.kl(p), p.distilled_kl) for p in data.sweep if p.architecture]


def _chosen_answer(data: ReportData, answers: Sequence[Answer]) -> Answer | None:
    """The chosen architecture, with what the sweep or the pick measured of the same choices.

    Of a later round with what the evaluation measured against the original: scores and the pick are about another parent. Without it, none.
    """
    if data.architecture is None:
        return None
    if data.round > 1:
        before, after = (data.models.get(name, {}).get("kl") for name in ("child_before_gkd", "child"))
        return None if before is None else Answer(data.architecture, "", before, after)
    choices = data.architecture.choices
    same = [a for a in answers if a.kl is not None and a.architecture.choices == choices]
    if same:
        return Answer(data.architecture, "", same[0].kl, same[0].distilled_kl)
    return Answer(data.architecture, "", data.measured_kls.get(choices))


def _infeasible(data: ReportData) -> list[tuple[SweepPoint, str]]:
    return [(p, p.why_none or "no architecture found") for p in data.sweep if not p.architecture]


def _drawn(data: ReportData, answers: Sequence[Answer]) -> list[Answer]:
    """The answers that share one vertical axis, by speed.

    A sum of KL scores predicts a KL, so it can stand beside a measured KL. Sums of other metrics cannot.
    """
    measured = any(a.kl is not None for a in answers)
    return sorted((a for a in answers if not measured or a.kl is not None or data.metric == "kl"), key=lambda a: a.place)


def _frontier_chart(data: ReportData, all_answers: Sequence[Answer]) -> Html:
    answers, chosen = _drawn(data, all_answers), _chosen_answer(data, all_answers)
    measured, distilled = [a for a in answers if a.kl is not None], [a for a in answers if a.distilled_kl is not None]
    if measured and chosen is not None and chosen.kl is None and data.metric != "kl":
        chosen = None  # its sum of scores has another unit than the axis
    if chosen is not None and answers and not measured and data.metric != "kl":
        chosen = (
            replace(chosen, kl=None) if data.round == 1 else None
        )  # its KL has another unit than the sums that it stands beside
    on_kl = bool(measured) or (chosen is not None and chosen.kl is not None)
    everything = [ORIGIN, *(a.place for a in answers), *((a.speedup, a.distilled_kl or 0.0) for a in distilled)]
    everything += [chosen.place] if chosen else []
    left, right = min(x for x, _ in everything), max(1.2, *(x for x, _ in everything))
    low, high = min(y for _, y in everything), max(1e-9, *(y for _, y in everything))
    vertical = UNITS["kl"] if on_kl else f"sum of scores ({data.unit})"
    axes = Axes(
        (left, right + 0.08 * (right - left)), (low, low + 1.15 * (high - low)),
        f"{data.costs_are} speed-up over the parent", vertical, x_unit=" ×",
    )  # fmt: skip
    line = [ORIGIN, *(a.place for a in measured or answers)]
    marks = [axes.line(line, "frontier-line")] if answers else []
    marks.append(axes.dot(ORIGIN, "parent-dot", "the parent"))
    for n, a in enumerate(answers):
        unmeasured = on_kl and a.kl is None
        what = f"asked {a.asked}: {_described(data, a)}"
        marks.append(axes.dot(a.place, "predicted" if unmeasured else "point", what, **opens(n)))
    for a in distilled:
        place = (a.speedup, a.distilled_kl or 0.0)
        marks.append(axes.diamond(place, f"asked {a.asked}: KL {nats(a.distilled_kl)} after GKD"))
    if chosen:
        marks.append(axes.dot(chosen.place, "chosen-dot", f"chosen: {_described(data, chosen)}", 8, **opens(len(answers))))
        marks.append(axes.caption(chosen.place, "chosen", -14, -4, anchor="end", class_="strong"))
    for point, reason in _infeasible(data):  # budgets without a speed-up, and those beyond the axis, are drawn at the right edge
        place_x = min(point.speedup_asked or axes.x[1], axes.x[1])
        marks.append(axes.cross((place_x, axes.y[1]), f"asked {point.asked}: {reason}"))
    key = [("origin", "parent")]
    if measured:
        key.append(("point", "answer to a budget: measured KL of the whole child"))
        key += [("predicted", "not measured: sum of scores")] if len(measured) < len(answers) else []
        key += [("distilled", "measured KL after GKD")] if distilled else []
    elif answers:
        key.append(("predicted" if on_kl else "point", "answer to a budget: sum of scores, not measured"))
    key += [("chosen", "chosen")] if chosen else []
    key += [("refused", "asked, but no architecture was found")] if _infeasible(data) else []
    against = "measured KL" if on_kl else "sum of scores"
    return tag("figure", axes.draw(*marks, label=f"{data.costs_are} speed-up against {against}"), legend(*key))


def _described(data: ReportData, answer: Answer) -> str:
    kl = f", measured KL {nats(answer.kl)}" if answer.kl is not None else ""
    a = answer.architecture
    return f"{data.costs_are} {number(a.predicted_speedup)} ×, sum of scores {damage(a.objective, a.metric)}{kl}, {a.status}"


def _sweep_row(answer: Answer, measured: bool, distilled: bool, batches: bool) -> list[object]:
    a = answer.architecture
    proven = "optimal" if a.status == "optimal" else a.status if a.status == "heuristic" else f"gap {percent(a.gap)}"
    kls = [*([nats(answer.kl)] if measured else []), *([nats(answer.distilled_kl)] if distilled else [])]
    costs = [*([a.predicted.batch_size] if batches else []), count(a.predicted.num_params), number(a.predicted.memory_mib)]
    return [answer.asked, times(a.predicted_speedup), damage(a.objective, a.metric), *kls, proven, *costs]


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
    known = {"optimal": "proven optimal", "heuristic": "a heuristic's, nothing proven"}
    why = "picked by measured KL" if a.status == "measured" else "the best that was found in time"
    proof = known.get(a.status, f"{why}; no answer's sum is below {damage(a.bound, a.metric, 4)} (gap {percent(a.gap)})")
    if a.unsolved_batch_sizes:
        proof += f"; not solved in time: batch size {', '.join(map(str, a.unsolved_batch_sizes))}"
    took = f" in {duration(a.solve_s)}" + (f"; asked: {asked}" if asked else "")
    against = f", against the child of round {data.round - 1}" if data.round > 1 else ""
    return note(f"Chosen by {a.searcher}", *size, took, f". Sum of scores {damage(a.objective, a.metric, 4)}{against}: {proof}.")


def architecture(data: ReportData) -> list[Html] | None:
    """The chosen architecture, one row per layer: attention to the left of the layer's number, the FFN to its right."""
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
    key += [k for k in (("linear", "linear layer"), ("noop", "no-op: the subblock is removed")) if k[0] in chosen]
    text = (
        "An outline is the parent's subblock. Its filled part is the share of KV heads (attention) or channels (FFN) that is kept"
    )
    text += ". For other variants, it is the share of parameters." if chosen - {PARENT, "noop"} else "."
    if runtimes:
        text += f" Time is the layer's {data.costs_are} runtime as a share of the parent's."
    made = [f"{i}: {x.now.label}" for i, x in enumerate(data.space.layers if data.space else ()) if x.now != LayerChoice()]
    if made:
        text += f" The parent is an earlier round's child. Its layers that are not the original's own are {', '.join(made)}."
    counts = (tag("p", tag("b", KIND_NAMES[kind], ": "), _counts(data.architecture, kind), class_="counts") for kind in KINDS)
    return [*counts, tag("figure", picture, legend(*key)), note(text)]


def _counts(a: Architecture, kind: SubblockKind) -> str:
    counts = Counter(choice.variant(kind) for choice in a.choices)
    return ", ".join(f"{n} × {shown(variant)}" for variant, n in counts.most_common())


def _runtimes_ms(data: ReportData, layer: int) -> tuple[float, float] | None:
    """A layer's runtime in the child and in the parent, in ms, from the profile."""
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
        facts.append(f"score {damage(score, data.metric)} ({data.unit})")
    if cost and parent:
        facts.append(f"runtime {number(runtime_ms(cost))} ms of {number(runtime_ms(parent))} ms ({data.costs_are})")
        facts.append(f"{count(cost.num_params)} of {count(parent.num_params)} parameters")
    return facts
