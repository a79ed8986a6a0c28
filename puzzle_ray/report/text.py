"""The section on text: what was taken of every source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from puzzle_ray.report.contents import ReportData
from puzzle_ray.report.markup import Html, html_table, join, note, percent, small, tag

HEADER = ("source", "documents", "tokens, share", "left out", "its end reached")
USE = {"train": "training", "heldout": "held-out text"}


def sources(data: ReportData) -> list[Html] | None:
    """Documents, tokens and drops of every source. Nothing for tokens of an earlier version, which did not count by source."""
    if not data.text_sources:
        return None
    several = {name: sum(source["name"] == name for source in data.text_sources) > 1 for name in ("train", "heldout")}
    rows: list[list[object]] = []
    for source in data.text_sources:
        weight = f", weight {source['weight']:g}" if several[source["name"]] else ""
        rows.append(
            [
                join([source["source"], " ", small(USE[source["name"]] + weight)]),
                f"{source['documents']:,}",
                _taken(source, data.text_sources),
                _left_out(source["dropped_rows"], len(source["left_out"])),
                {0: "no", 1: "once"}.get(source["times_read"], f"{source['times_read']} times"),
            ]
        )
    said = "Rows without text are dropped. A mixture takes the next document of the source that is furthest behind its weight."
    return [html_table(HEADER, rows, class_="kept"), note(said)]


def _taken(source: Mapping[str, Any], sources: Sequence[Mapping[str, Any]]) -> Html:
    """Its tokens, and their share of those of all sources; by split where its text went to both."""
    beside = [other["tokens"] for other in sources if other["name"] == source["name"]]
    several = len(source["tokens"]) > 1
    parts: list[Html | str] = []
    for split, count in source["tokens"].items():
        share = percent(count / max(1, sum(tokens[split] for tokens in beside)))
        parts.append(f" {count:,} " if parts else f"{count:,} ")
        parts.append(small(f"{share} of {USE[split]}" if several else share))
    return tag("td", *parts)


def _left_out(rows: int, files: int) -> str:
    counts = ((rows, "row"), (files, "file"))
    return ", ".join(f"{count:,} {unit}{'s' * (count != 1)}" for count, unit in counts if count) or "–"
