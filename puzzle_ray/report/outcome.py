"""Results: the main figures, the evaluation, the time by stage, and how to run it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from puzzle_ray.artifacts import Costs
from puzzle_ray.evaluation.tasks import guess_remark, why_no_interval
from puzzle_ray.report.contents import MODEL_NAMES, ReportData
from puzzle_ray.report.markup import (
    Html,
    count,
    css_width,
    duration,
    html_table,
    join,
    nats,
    note,
    number,
    percent,
    signed,
    small,
    tag,
    times,
)

FIGURES = {
    "heldout_loss": "Held-out loss, nats per token",
    "kl": "KL to the parent, nats per token",
    "top1_agreement": "Top-1 agreement with the parent",
    "downstream_accuracy": "Questions answered right (by log-probability per token), not used for scores",
    "batch_size": "Batch size",
    "prefill_tokens_per_s": "Prefill, tokens/s",
    "decode_tokens_per_s": "Decode, tokens/s",
    "throughput_tokens_per_s": "Throughput, tokens/s, in and out",
    "runtime_ms": "Runtime of the scenario, ms",
    "measured_speedup": "Speed-up, measured",
    "memory_mib": "Memory: weights and KV cache, MiB",
    "num_params": "Parameters",
}


def headline(data: ReportData) -> Html | None:
    """The run in a few main figures."""
    cards = [*_speed(data), *_quality(data), *_kept(data), *_size(data)]
    shown = (tag("div", tag("h2", what), tag("p", big), small(more), class_="card") for what, big, more in cards)
    return tag("div", *shown, class_="cards") if cards else None


def _speed(data: ReportData) -> list[tuple[str, str, str]]:
    evaluation, architecture = data.evaluation or {}, data.architecture
    predicted = architecture.predicted_speedup if architecture else evaluation.get("predicted_speedup")
    measured, asked = evaluation.get("measured_speedup"), architecture.limits.get("speedup") if architecture else None
    more = [f"{data.costs_are} {times(predicted)}"] if measured and predicted else []
    more += [f"asked {asked:g}\u00a0×"] if asked else []
    if measured:
        return [("Speed-up, measured", times(measured), ", ".join(more))]
    why = evaluation.get("not_measured", "not measured yet")
    return [(f"Speed-up, {data.costs_are}", times(predicted), ", ".join([*more, why]))] if predicted else []


def _quality(data: ReportData) -> list[tuple[str, str, str]]:
    parent, (name, child) = data.models.get("parent", {}), _last_child(data)
    before = data.models.get("child_before_gkd", {}).get("heldout_loss") if name == "child" else None
    cards = []
    if "heldout_loss" in parent and "heldout_loss" in child:
        was, now = parent["heldout_loss"], child["heldout_loss"]
        more = f"{signed(now - was)} nats per token" + (f"; {number(before)} before GKD" if before else "")
        cards.append(("Held-out loss", _from_to(number(was), number(now)), more))
    if "top1_agreement" in child:
        more = f"KL {nats(child['kl'])} nats per token" if "kl" in child else ""
        cards.append(("Top-1 agreement", percent(child["top1_agreement"]), more))
    return cards


def _kept(data: ReportData) -> list[tuple[str, str, str]]:
    """What the last child kept of the parent's answers to tasks, on the mean."""
    mean = ((data.quality or {}).get("tasks") or {}).get("mean")
    own = list(mean["models"].values())[-1] if mean else None
    if own is None or own["retained"] is None:
        return []
    kept = own["retained"]
    no_bounds = kept["low"] is None or kept["high"] is None
    bounds = f"no interval: {why_no_interval(own)}" if no_bounds else f"{percent(kept['low'])} to {percent(kept['high'])}"
    more = [bounds, *([guess_remark(own)] if own["chance"] is not None and own["above_chance"] is None else [])]
    return [("Kept of the parent's accuracy", percent(kept["value"]), "; ".join(more))]


def _size(data: ReportData) -> list[tuple[str, str, str]]:
    if data.architecture is None:
        return []
    was, now = data.architecture.parent_predicted, data.architecture.predicted
    params = percent(now.num_params / was.num_params - 1, 0, sign=True)
    memory = percent(now.memory_mib / was.memory_mib - 1, 0, sign=True)
    sizes = " and ".join(f"{size}" for size in dict.fromkeys((was.batch_size, now.batch_size)))
    return [
        ("Parameters", _from_to(count(was.num_params), count(now.num_params)), params),
        ("Memory, MiB, computed", _from_to(number(was.memory_mib), number(now.memory_mib)),
         f"{memory}; weights and KV cache at batch {sizes}"),
    ]  # fmt: skip


def _from_to(before: str, after: str) -> str:
    """`3.93 M`, `2.73 M` -> `3.93 → 2.73 M`."""
    value, _, unit = before.partition("\u00a0")
    return f"{value if after.endswith(unit) else before} → {after}"


def _last_child(data: ReportData) -> tuple[str, Mapping[str, float]]:
    """The last child of the pipeline that was evaluated, and its figures."""
    name = next((n for n in ("child", "child_before_gkd") if n in data.models), "")
    return name, data.models.get(name, {})


def evaluation(data: ReportData) -> list[Html] | None:
    """The figures of every evaluated model, and predictions beside measurements."""
    parts = []
    if data.models:
        names = [MODEL_NAMES.get(name, name) for name in data.models]
        present = [key for key in FIGURES if any(model.get(key) is not None for model in data.models.values())]
        rows = [[FIGURES[key], *(written_figure(key, model.get(key)) for model in data.models.values())] for key in present]
        same = "GKD changes no shape: the child before it is as fast as the child."
        known = note(same) if {"child", "child_before_gkd"} <= data.models.keys() else None
        test = (data.evaluation or {}).get("heldout", {}).get("test")
        text = f"Held-out figures: held-out sequences {test}, by which no block was scored and no child picked."
        from_which = note(text) if test else None
        why = (data.evaluation or {}).get("not_measured")
        untimed = note(f"Speed is {why}.") if why else None
        known = None if untimed else known
        parts.append(tag("div", tag("h3", "Evaluated in one run"), html_table(["", *names], rows), from_which, known, untimed))
    if data.architecture:
        text = f"Difference: measured against {data.costs_are}."
        text += "" if data.models else " An evaluation fills the second column."
        if data.estimated and data.profile and data.models:
            found = data.evaluation or {}
            by = f"speed is {found['not_measured']}" if "not_measured" in found else f"measured by {found.get('measured_by')}"
            text += f" Estimated by {data.profile.engine} for {data.profile.device}; {by}."
        title = tag("h3", f"{data.costs_are.capitalize()} beside measured")
        parts.append(tag("div", title, _comparison(data), note(text)))
    scenario = note(f"Serving scenario: {data.serving}.") if data.serving else None
    return [join([scenario, tag("div", *parts, class_="columns")])] if parts else None


def written_figure(key: str, value: float | None) -> str:
    """One of `FIGURES` as text."""
    written: dict[str, Callable[[float | None], str]] = {
        "kl": nats,
        "num_params": count,
        "batch_size": lambda size: "–" if size is None else f"{size:g}",
        "top1_agreement": percent,
        "downstream_accuracy": percent,
        "measured_speedup": times,
    }
    return written.get(key, number)(value)


def _comparison(data: ReportData) -> Html:
    a, (_, child) = data.architecture, _last_child(data)
    assert a is not None
    rows: list[list[object]] = []

    def add(label: str, predicted: float, measured: float | None) -> None:
        off = percent(measured / predicted - 1, 1, sign=True) if measured and predicted else "–"
        rows.append([label, number(predicted), number(measured), off])

    add("Speed-up", a.predicted_speedup, (data.evaluation or {}).get("measured_speedup"))
    models: tuple[tuple[str, Costs, Mapping[str, float]], ...] = (
        ("Parent", a.parent_predicted, data.models.get("parent", {})), ("Child", a.predicted, child),
    )  # fmt: skip
    for model, costs, measured in models:
        apart = a.parent_predicted.batch_size != a.predicted.batch_size
        name = f"{model} at batch {costs.batch_size}" if apart else model
        add(f"{name}: prefill, ms", costs.prefill_ms, measured.get("prefill_ms"))
        add(f"{name}: one decoding step, ms", costs.decode_ms, measured.get("decode_ms"))
        add(f"{name}: runtime, ms", costs.runtime_ms, measured.get("runtime_ms"))
        add(f"{name}: throughput, tokens/s", costs.throughput_tokens_per_s, measured.get("throughput_tokens_per_s"))
    return html_table(["", data.costs_are, "measured", "difference"], rows)


def stage_times(data: ReportData) -> list[Html] | None:
    """The time of every stage."""
    if not data.stage_seconds:
        return None
    longest = max(data.stage_seconds.values()) or 1.0
    rows: list[list[object]] = []
    for name, seconds in data.stage_seconds.items():
        bar = tag("i", tag("b", style=css_width(seconds / longest)), class_="bar")
        rows.append([name, tag("td", bar), duration(seconds)])
    rows.append([tag("b", "sum of stages"), "", tag("b", duration(sum(data.stage_seconds.values())))])
    return [html_table(["stage", "", "time"], rows, class_="stages")]


def configuration(data: ReportData) -> list[Html] | None:
    """The configuration, the versions and the machine."""
    parts = [_details("Configuration", tag("pre", data.config_yaml))] if data.config_yaml else []
    for title, facts in (("Versions", data.versions), ("Machine", data.machine)):
        if facts:
            rows = [[name, tag("td", value, class_="text")] for name, value in facts.items()]
            parts.append(_details(title, html_table((), rows, class_="facts")))
    return parts or None


def _details(title: str, content: Html) -> Html:
    return tag("details", tag("summary", title), content)
