"""The page's sections about the search and the child. Each is a function of the run; None where the run has nothing for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from puzzle_ray.artifacts import KINDS, MIB, PARENT, Architecture, Costs, ProfileRow, SubblockKind
from puzzle_ray.report.charts import Axes
from puzzle_ray.report.contents import ReportData, runtime_ms
from puzzle_ray.report.markup import (
    Html,
    count,
    duration,
    join,
    legend,
    note,
    number,
    percent,
    small,
    table,
    tag,
    times,
)

MODEL_NAMES = {"parent": "Parent", "child_before_gkd": "Child before GKD", "child": "Child"}
KIND_NAMES: Mapping[str, str] = {"attention": "Attention", "ffn": "FFN", "fixed": "Embedding, head, overhead"}


def _child(data: ReportData) -> tuple[str, Mapping[str, float]]:
    """The furthest child that was evaluated."""
    name = next((n for n in ("child", "child_before_gkd") if n in data.models), "")
    return name, data.models.get(name, {})


def headline(data: ReportData) -> Html | None:
    """The run in a few big numbers."""
    architecture, evaluation = data.architecture, data.evaluation or {}
    parent, (name, child) = data.models.get("parent", {}), _child(data)
    cards: list[tuple[str, str, str]] = []
    predicted = architecture.predicted_speedup if architecture else evaluation.get("predicted_speedup")
    kind = "estimated" if data.estimated else "predicted"
    measured = evaluation.get("measured_speedup")
    if measured is not None:
        asked = architecture.limits.get("speedup") if architecture else None
        cards.append(("Speed-up, measured", times(measured), f"{kind} {times(predicted)}" + (f", asked {times(asked)}" if asked else "")))
    elif predicted is not None:
        cards.append((f"Speed-up, {kind}", times(predicted), "not measured yet"))
    if "heldout_loss" in parent and "heldout_loss" in child:
        change = child["heldout_loss"] - parent["heldout_loss"]
        before = data.models.get("child_before_gkd", {}).get("heldout_loss") if name == "child" else None
        rest = f" ({number(before)} before GKD)" if before is not None else ""
        cards.append(
            ("Held-out loss", _pair(number(parent["heldout_loss"]), number(child["heldout_loss"])),
             f"{'+' if change > 0 else ''}{number(change, 2)} nats per token{rest}")
        )
    if "top1_agreement" in child:
        kl = f"KL {number(child['kl'])} nats per token" if "kl" in child else ""
        cards.append(("Same next token as the parent", percent(child["top1_agreement"]), kl))
    if architecture:
        was, now = architecture.parent_predicted, architecture.predicted
        cards.append(("Parameters", _pair(count(was.num_params), count(now.num_params)),
                      percent(now.num_params / was.num_params - 1, signed=True)))
        cards.append((f"Memory, {kind}", _pair(number(was.memory_mib), number(now.memory_mib)) + "\u00a0MiB",
                      f"{percent(now.memory_mib / was.memory_mib - 1, signed=True)}, weights and KV cache at batch {now.batch_size}"))
    if not cards:
        return None
    return tag("div", *(tag("div", tag("h2", a), tag("p", b), small(c), class_="card") for a, b, c in cards), class_="cards")


def _pair(before: str, after: str) -> str:
    return f"{before} → {after}"


def frontier(data: ReportData) -> list[Html] | None:
    """Predicted speed-up against the sum of scores, for every budget of the sweep."""
    answers = [(p.speedup_asked, p.architecture) for p in data.sweep if p.architecture]
    refused = [p for p in data.sweep if p.architecture is None]
    chosen = data.architecture
    if not answers and chosen is None:
        return None
    found = [a for _, a in answers] + ([chosen] if chosen else [])
    right = max([a.predicted_speedup for a in found] + [p.speedup_asked for p in refused] + [1.2])
    top = max([a.objective for a in found] + [1e-9])
    axes = Axes((min(1.0, *(a.predicted_speedup for a in found), 1.0), right + 0.05 * (right - 1)), (min(0.0, *(a.objective for a in found), 0.0), top * 1.12),
                f"{_kind(data)} speed-up over the parent", f"sum of scores ({data.unit})", x_unit=" ×")
    points = sorted((a.predicted_speedup, a.objective) for _, a in answers)
    marks: list[Html] = [axes.line([(1.0, 0.0), *points], "frontier-line")] if points else []
    marks.append(axes.dot((1.0, 0.0), "parent-dot", "parent: speed-up 1 ×, no damage"))
    marks.append(axes.caption((1.0, 0.0), "parent", dx=9, dy=-8, anchor="start"))
    for asked, a in answers:
        tip = f"asked {number(asked)} ×, {_kind(data).lower()} {number(a.predicted_speedup)} ×, sum of scores {number(a.objective)}, {a.status}"
        marks.append(axes.dot((a.predicted_speedup, a.objective), "point", tip))
    if chosen:
        place = (chosen.predicted_speedup, chosen.objective)
        tip = f"chosen: {number(place[0])} ×, sum of scores {number(place[1])}, {chosen.status}"
        marks.append(axes.dot(place, "chosen-dot", tip, radius=8))
        marks.append(axes.caption(place, "chosen", dx=-13, dy=-4, anchor="end", class_="strong"))
    marks += [axes.cross((p.speedup_asked, top * 1.06), f"{number(p.speedup_asked)} ×: {p.infeasible_reason or 'no architecture'}") for p in refused]
    drawn = axes.draw(*marks, label="predicted speed-up against sum of scores")
    key = legend(("attention", "answer to a budget"), ("chosen", "chosen"), *([("refused", "no architecture")] if refused else []))
    rows = [_sweep_row(asked, a) for asked, a in answers]
    rows += [[times(p.speedup_asked), tag("td", f"none: {p.infeasible_reason or 'no reason given'}", colspan=5, class_="text")] for p in refused]
    header = ["asked", _kind(data).lower(), "sum of scores", "proven", "params", "MiB"]
    answers_table = table(header, rows) if rows else None
    return [tag("div", tag("figure", drawn, key), tag("div", answers_table, *_search_facts(data)), class_="columns")]


def _kind(data: ReportData) -> str:
    return "Estimated" if data.estimated else "Predicted"


def _sweep_row(asked: float, a: Architecture) -> list[object]:
    proven = "optimal" if a.status == "optimal" else f"{a.status}, gap {percent(a.gap)}"
    predicted = a.predicted
    return [times(asked), times(a.predicted_speedup), number(a.objective), proven, count(predicted.num_params), number(predicted.memory_mib)]


def _search_facts(data: ReportData) -> list[Html]:
    a = data.architecture
    if a is None:
        return []
    limits = ", ".join(f"{name} {number(value)}" for name, value in a.limits.items())
    size = f" out of {data.space.size:.2g} architectures" if data.space else ""
    certainty = f"{a.status}: sum of scores {number(a.objective, 4)}, proven lower bound {number(a.bound, 4)}"
    if a.status == "heuristic":
        certainty = f"heuristic, nothing proven: sum of scores {number(a.objective, 4)}"
    asked = f" for {limits}" if limits else ""
    return [note(f"Chosen by {a.searcher}{asked}{size} in {duration(a.solve_s)}; {certainty}.")]


def architecture(data: ReportData) -> list[Html] | None:
    """One row per layer; attention grows to the left of the spine, the FFN to its right; the outline is the parent."""
    if data.architecture is None:
        return None
    layers = range(len(data.architecture.choices))
    timed = all(_layer_ms(data, i) for i in layers)
    header: list[object] = ["Attention", tag("span", "layer"), "FFN"]
    if timed:
        header.append("time")
    rows = []
    for i in layers:
        cells = [tag("td", _box(data, i, "attention"), class_="left"), tag("th", i, scope="row"), tag("td", _box(data, i, "ffn"))]
        pair = _layer_ms(data, i)
        if timed and pair:
            tip = f"layer {i}: {number(pair[0])} ms, the parent's {number(pair[1])} ms ({_kind(data).lower()})"
            bar = tag("i", tag("b", style=f"width:{_css(pair[0] / pair[1])}"), class_="bar")
            cells.append(tag("td", bar, percent(round(pair[0] / pair[1], 2)), title=tip, class_="time"))
        rows.append(tag("tr", *cells))
    head = tag("tr", *(tag("th", h, scope="col") for h in header))
    kinds = {data.architecture.choices[i].variant(k) for i in layers for k in KINDS}
    key = [("attention", "attention kept"), ("ffn", "FFN kept"), ("linear", "linear layer"), ("noop", "no-op: nothing left")]
    shown = [k for k in key if k[0] in ("attention", "ffn") or k[0] in kinds]
    picture = tag("table", tag("thead", head), tag("tbody", *rows), class_="arch" + (" dense" if len(layers) > 40 else ""))
    counts = join(tag("p", tag("b", KIND_NAMES[kind] + ": "), _counts(data, kind), class_="counts") for kind in KINDS)
    explained = "Each outline is the parent's layer. The filled width is the share of KV heads (attention) or channels (FFN) kept"
    explained += "; of a linear layer, its share of the parameters." if "linear" in kinds else "."
    if timed:
        explained += f" Time: {_kind(data).lower()} time of the layer as a share of the parent's, in the profile's scenario."
    return [counts, tag("figure", picture, legend(*shown)), note(explained)]


def _layer_ms(data: ReportData, layer: int) -> tuple[float, float] | None:
    """A layer's (child, parent) runtime by the profile."""
    costs = [(data.cost(layer, k, data.chosen(layer, k) or PARENT), data.cost(layer, k, PARENT)) for k in KINDS]
    pairs = [(runtime_ms(own), runtime_ms(parent)) for own, parent in costs if own and parent]
    total = sum(parent for _, parent in pairs)
    return (sum(own for own, _ in pairs), total) if len(pairs) == len(KINDS) and total > 0 else None


def _box(data: ReportData, layer: int, kind: SubblockKind) -> Html:
    variant = data.chosen(layer, kind) or PARENT
    kept, cost, parent_cost = data.share_kept(layer, kind, variant), data.cost(layer, kind, variant), data.cost(layer, kind, PARENT)
    facts = [f"layer {layer}, {KIND_NAMES[kind]}: {variant}"]
    if kept is not None and variant.partition(":")[0] in ("gqa", "ffn"):
        facts.append(f"{percent(kept)} of the {'KV heads' if kind == 'attention' else 'channels'} kept")
    score = data.score(layer, kind, variant)
    if score is not None and variant != PARENT:
        facts.append(f"score {number(score)} ({data.unit})")
    if cost and parent_cost:
        facts.append(f"runtime {number(runtime_ms(cost))} ms of {number(runtime_ms(parent_cost))} ms ({_kind(data).lower()})")
        facts.append(f"{count(cost.num_params)} of {count(parent_cost.num_params)} parameters")
    head = variant.partition(":")[0]
    colour = head if head in ("linear", "noop") else kind if head in (PARENT, "gqa", "ffn") else "other"
    share = f" · {percent(round(kept, 2))}" if kept is not None and variant not in (PARENT, "noop") else ""
    label = "no-op" if variant == "noop" else variant
    fill = tag("i", class_=colour, style=f"width:{_css(kept)}") if kept else None
    return tag("div", fill, tag("span", label, tag("em", share)), class_=f"box {'is-noop' if variant == 'noop' else ''}", title="\n".join(facts))


def _css(share: float) -> str:
    return f"{min(100.0, max(0.0, 100 * share)):.1f}%"


def _counts(data: ReportData, kind: SubblockKind) -> str:
    chosen = Counter(choice.variant(kind) for choice in (data.architecture.choices if data.architecture else ()))
    return ", ".join(f"{n} × {'no-op' if variant == 'noop' else variant}" for variant, n in chosen.most_common())


def costs(data: ReportData) -> list[Html] | None:
    """What every subblock shape costs."""
    profile = data.profile
    if profile is None or not profile.rows:
        return None
    many_types = len({r.layer_type for r in profile.rows if r.layer_type}) > 1
    many_batches = len(profile.batch_sizes) > 1
    header = ["subblock", *(["batch"] if many_batches else []), "prefill, ms", "decode, ms per step", "weights, MiB", "KV, KiB per token", "params"]
    rows = []
    for r in profile.rows:
        name = [KIND_NAMES.get(r.subblock, r.subblock)] + ([r.variant] if r.subblock != r.variant else [])
        name += [r.layer_type] if many_types and r.layer_type else []
        parent = next((p for p in profile.rows if (p.subblock, p.variant, p.layer_type, p.batch_size) == (r.subblock, PARENT, r.layer_type, r.batch_size)), None)
        rows.append([" · ".join(name), *([r.batch_size] if many_batches else []), *_times(r, parent, profile.estimated),
                     number(r.weight_bytes / MIB), number(r.kv_bytes_per_token / 1024), count(r.num_params)])
    how = "Computed, not measured:" if profile.estimated else "Measured:"
    serving = f"; {_scenario(data)}" if data.scenario else ""
    spread = "" if profile.estimated else " ± is half the inter-quartile range of the repeats; the percentage is of the parent's subblock."
    engine = f"{profile.engine} {profile.engine_version}".strip()
    return [note(f"{how} {engine} on {profile.device}, {profile.dtype}{serving}.{spread}"), table(header, rows)]


def _times(r: ProfileRow, parent: ProfileRow | None, estimated: bool) -> list[Html]:
    cells = []
    for phase in ("prefill", "decode"):
        value, spread = getattr(r, f"{phase}_ms"), getattr(r, f"{phase}_spread_ms")
        whole = getattr(parent, f"{phase}_ms") if parent and parent is not r else 0
        share = f" {percent(round(value / whole, 2))}" if whole else ""
        cells.append(tag("td", number(value), small("" if estimated else f" ± {number(spread, 2)}", share)))
    return cells


def _scenario(data: ReportData) -> str:
    s = data.scenario
    return f"batch {s.batch_size}, {s.input_tokens} tokens in, {s.output_tokens} out" if s else ""


def outcome(data: ReportData) -> list[Html] | None:
    """What was kept and gained, and the prediction beside the measurement."""
    parts: list[Html] = []
    shown: list[tuple[str, str, float, str]] = [
        ("Held-out loss, nats per token", "heldout_loss", 1, ""), ("KL to the parent, nats per token", "kl", 1, ""),
        ("Same next token as the parent", "top1_agreement", 100, "\u00a0%"), ("Prefill, tokens/s", "prefill_tokens_per_s", 1, ""),
        ("Decode, tokens/s", "decode_tokens_per_s", 1, ""), ("Runtime of the scenario, ms", "runtime_ms", 1, ""),
        ("Throughput, tokens/s (in + out)", "throughput_tokens_per_s", 1, ""), ("Memory, MiB", "memory_mib", 1, ""),
    ]  # fmt: skip
    models = data.models
    if models:
        rows: list[list[object]] = []
        for label, key, factor, unit in shown:
            values = [m.get(key) for m in models.values()]
            if any(v is not None for v in values):
                rows.append([label, *("–" if v is None else number(v * factor) + unit for v in values)])
        rows.append(["Parameters", *(count(m.get("num_params")) for m in models.values())])
        parts += [tag("h3", "Evaluated, all in one run"), table(["", *(MODEL_NAMES.get(n, n) for n in models)], rows)]
    if data.architecture:
        parts += [tag("h3", f"{_kind(data)} beside measured"), _comparison(data, data.architecture)]
        if not models:
            parts.append(note("Nothing has been measured on the child yet; evaluate it to fill the second column."))
    return parts or None


def _comparison(data: ReportData, a: Architecture) -> Html:
    parent, (_, child) = data.models.get("parent", {}), _child(data)
    measured_speedup = (data.evaluation or {}).get("measured_speedup")
    rows: list[list[object]] = []

    def add(label: str, predicted: float, measured: float | None, unit: str = "") -> None:
        off = percent(measured / predicted - 1, signed=True) if measured is not None and predicted else "–"
        rows.append([label, number(predicted) + unit, number(measured) + (unit if measured is not None else ""), off])

    add("Speed-up", a.predicted_speedup, measured_speedup, "\u00a0×")
    models: list[tuple[str, Costs, Mapping[str, float]]] = [("parent", a.parent_predicted, parent), ("child", a.predicted, child)]
    for name, predicted, measured in models:
        add(f"Runtime of the {name}, ms", predicted.runtime_ms, measured.get("runtime_ms"))
        add(f"Throughput of the {name}, tokens/s", predicted.throughput_tokens_per_s, measured.get("throughput_tokens_per_s"))
    where = f" Scenario: {_scenario(data)}." if data.scenario else ""
    return join([table(["", _kind(data).lower(), "measured", "difference"], rows), note(f"Throughput counts input and output tokens.{where}")])
