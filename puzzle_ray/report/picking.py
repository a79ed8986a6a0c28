"""What the pick measured: every child beside what was predicted of it, the race of the finalists, and how damages of pairs add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from puzzle_ray.report.contents import ReportData
from puzzle_ray.report.markup import Html, count, damage, html_table, nats, note, number, tag
from puzzle_ray.search.interactions import NOT_MEASURED
from puzzle_ray.search.measured import kl_or_inf

CORRECTED = (
    "The corrected prediction of a child was made before it was measured, by the children measured until then: each of its blocks' scores "
    "counts as many times as the sums of children, above all of those with this block, were too low."
)


def measured_children(data: ReportData) -> list[Html] | None:
    """Everything that was measured before the pick."""
    if not data.picked:
        return None
    parts = (_children(data), _left_out(data.picked), _race(data), _pairs(data.picked))
    return [part for part in parts if part is not None]


def _children(data: ReportData) -> Html:
    """A row for every whole child, by measured KL."""
    picked = data.picked["picked"]
    rows = list(data.picked["candidates"])
    rows += [] if any(row["choices"] == picked["choices"] for row in rows) else [picked]
    corrected, distilled = (any(name in row for row in rows) for name in ("predicted_corrected", "kl_distilled"))
    header = ["child", "sum of scores", *(["corrected prediction"] if corrected else []), "measured KL", "standard error"]
    header += [f"KL distilled for a while{_of_original(data)}"] if distilled else []
    shown = []
    for row in sorted(rows, key=lambda row: kl_or_inf(row["kl"])):
        cells = [row["origin"] + (", picked" if row["choices"] == picked["choices"] else "")]
        cells.append(damage(row["predicted"], data.metric))
        cells += [nats(row.get("predicted_corrected"))] if corrected else []
        cells += [nats(row["kl"]), number(row["stderr"], 2), *([nats(row.get("kl_distilled"))] if distilled else [])]
        shown.append(cells)
    words = f"KL to {_parent(data)} on {count(data.picked['tokens'])} held-out tokens, before distillation."
    return tag("div", html_table(header, shown), note(f"{words} {CORRECTED}" if corrected else words))


def _parent(data: ReportData) -> str:
    """Which model whole children are measured against before the pick."""
    return f"the child of round {data.round - 1}" if data.round > 1 else "the parent"


def _of_original(data: ReportData) -> str:
    """Said of KLs of distilled children, where the others of a table are to an earlier round's child."""
    return ", to the original" if data.round > 1 else ""


def _left_out(picked: Mapping[str, Any]) -> Html | None:
    reasons = [tag("li", f"{name}: {reason}") for name, reason in picked["left_out"].items()]
    return tag("div", note("Not measured:"), tag("ul", *reasons)) if reasons else None


def _race(data: ReportData) -> Html | None:
    """The finalists of the pick: held-out KL before distillation and at every rung, and where each stopped."""
    race: Sequence[Mapping[str, Any]] = data.picked.get("race", ())
    if not race:
        return None
    rungs = max((row["rungs"] for row in race), key=len)
    start = f"at the start, to {_parent(data)}" if data.round > 1 else "at the start"
    header = ["finalist", start, *(f"{count(rung['tokens'])} tokens" for rung in rungs), "ended"]
    rows = []
    for row in sorted(race, key=lambda row: (-len(row["rungs"]), row["rungs"][-1]["kl"])):
        kls = [nats(rung["kl"]) for rung in row["rungs"]] + [""] * (len(rungs) - len(row["rungs"]))
        last = row["rungs"][-1]
        ended = "won" if last["goes_on"] else f"stopped at step {last['step']}"
        rows.append([" = ".join([row["origin"], *row["also"]]), nats(row["kl"]), *kls, ended])
    words = "The pick is by a race: finalists begin the distillation of the whole schedule, and the best ones at a rung go on."
    return tag(
        "div", note(words, f" Held-out KL{_of_original(data)}, by the tokens that each has read:"), html_table(header, rows)
    )


def _pairs(picked: Mapping[str, Any]) -> Html:
    """How damages of two blocks add up, where that was measured."""
    if not picked["interactions"]:
        return note(NOT_MEASURED)
    header = ("two blocks", "KL with both", "with the first", "with the second", "more together than the two alone")
    rows = [
        (f"{row['a']}, {row['b']}", *(nats(row[name]) for name in ("kl_both", "kl_a", "kl_b")), number(row["interaction"]))
        for row in sorted(picked["interactions"], key=lambda row: -abs(row["interaction"]))
    ]
    return html_table(header, rows)
