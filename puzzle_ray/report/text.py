"""The section on text: what was taken of every source."""

from __future__ import annotations

from puzzle_ray.report.contents import ReportData
from puzzle_ray.report.markup import Html, html_table, join, note, percent, small

HEADER = ("source", "documents", "tokens", "share of the tokens", "left out", "read to its end")


def sources(data: ReportData) -> list[Html] | None:
    """Documents, tokens and drops of every source. Nothing for tokens of an earlier version, which did not count by source."""
    if not data.text_sources:
        return None
    several = {name: sum(source["name"] == name for source in data.text_sources) > 1 for name in ("train", "heldout")}
    rows: list[list[object]] = []
    for source in data.text_sources:
        use = {"train": "training", "heldout": "held out"}[source["name"]]
        weight = f", weight {source['weight']:g}" if several[source["name"]] else ""
        rows.append(
            [
                join([source["source"], " ", small(use + weight)]),
                f"{source['documents']:,}",
                f"{sum(source['tokens'].values()):,}",
                percent(source["share"]),
                _left_out(source["dropped_rows"], len(source["left_out"])),
                {0: "no", 1: "once"}.get(source["times_read"], f"{source['times_read']} times"),
            ]
        )
    said = "Rows without text are dropped. A mixture takes the next document of the source that is furthest behind its weight."
    return [html_table(HEADER, rows, class_="kept"), note(said)]


def _left_out(rows: int, files: int) -> str:
    counts = ((rows, "row"), (files, "file"))
    return ", ".join(f"{count:,} {unit}{'s' * (count != 1)}" for count, unit in counts if count) or "–"
