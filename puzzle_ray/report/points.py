"""What a point of the frontier holds, opened by a click on it: its architecture, its costs, its KL."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from puzzle_ray.artifacts import Architecture, LayerChoice
from puzzle_ray.report.contents import shown
from puzzle_ray.report.markup import Html, count, damage, html_table, join, nats, number, percent, tag, times


def point_id(number_of_point: int) -> str:
    """What a mark on the chart opens."""
    return f"point-{number_of_point}"


def opens(number_of_point: int) -> dict[str, Any]:
    """Attributes of a mark that opens a point's details, by a click or the Enter key."""
    return {"data_opens": point_id(number_of_point), "tabindex": 0, "role": "button"}


def point_details(
    number_of_point: int, title: str, architecture: Architecture, costs_are: str, kl: float | None, distilled_kl: float | None
) -> Html:
    """A closed box with everything about one answer."""
    facts: list[list[object]] = [["sum of scores", damage(architecture.objective, architecture.metric), ""]]
    facts += [["measured KL, nats per token", nats(kl), ""]] if kl is not None else []
    facts += [["KL after GKD, nats per token", nats(distilled_kl), ""]] if distilled_kl is not None else []
    table = html_table([f"{costs_are} costs", "child", "of the parent's"], [*_costs(architecture), *facts])
    layers = html_table(["layers", "attention", "FFN"], [_row(run) for run in layer_runs(architecture.choices)], class_="texts")
    summary = tag("summary", f"{title}: {costs_are} {times(architecture.predicted_speedup)}")
    inside = tag("div", table, layers, class_="columns")
    return tag("details", summary, inside, id=point_id(number_of_point), class_="point-details")


def _costs(architecture: Architecture) -> list[list[object]]:
    child, parent = architecture.predicted, architecture.parent_predicted

    def row(name: str, of: str, written: str) -> list[object]:
        whole = getattr(parent, of)
        return [name, written, percent(getattr(child, of) / whole, 0) if whole else "–"]

    apart = child.batch_size != parent.batch_size
    return [
        *([["batch size", child.batch_size, f"{parent.batch_size} there"]] if apart else []),
        row("prefill, ms", "prefill_ms", number(child.prefill_ms)),
        row("decode, ms a step", "decode_ms", number(child.decode_ms)),
        row("runtime, ms", "runtime_ms", number(child.runtime_ms)),
        row("throughput, tokens/s", "throughput_tokens_per_s", number(child.throughput_tokens_per_s)),
        row("memory, MiB", "memory_mib", number(child.memory_mib)),
        row("parameters", "num_params", count(child.num_params)),
    ]


def layer_runs(choices: tuple[LayerChoice, ...]) -> list[tuple[str, LayerChoice]]:
    """Neighbouring layers of the same choice together: `0-3`, choice."""
    found = []
    for choice, run in groupby(enumerate(choices), key=lambda item: item[1]):
        layers = [layer for layer, _ in run]
        found.append((f"{layers[0]}–{layers[-1]}" if len(layers) > 1 else f"{layers[0]}", choice))
    return found


def _row(run: tuple[str, LayerChoice]) -> list[object]:
    layers, choice = run
    return [layers, *(tag("td", shown(variant), class_="text") for variant in (choice.attention, choice.ffn))]


def all_details(boxes: list[Html]) -> Html | None:
    """Under the chart, in the order of the points."""
    return tag("div", join(boxes), class_="points") if boxes else None
