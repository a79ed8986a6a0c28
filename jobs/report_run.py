"""Make the run's page: frontier, the child layer by layer, tables, curves. With two reports: both side by side."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from jobs.command import RESULTS, Config, Data, Debug, ParentName, Recipe, Settings, StoreRoot, Verb, stage_verb
from jobs.run import Run
from puzzle_ray.errors import ConfigError

Reports = Annotated[
    list[str] | None, typer.Argument(help="Two reports to compare: names as `store ls` shows them, report-KEY, or paths or URLs.")
]
Out = Annotated[str, typer.Option(help="Where the page of a comparison is written.")]


def work(run: Run) -> None:
    from jobs.stages.report import PAGE

    print(run.done("report").path(PAGE))


MADE = stage_verb("report-run", __doc__, RESULTS, work)


def report_run(
    reports: Reports = None,
    recipe: Recipe = None,
    config: Config = None,
    set_: Settings = None,
    parent: ParentName = None,
    data: Data = None,
    store: StoreRoot = None,
    out: Out = "comparison.html",
    debug: Debug = False,
) -> None:
    """Make the run's page: frontier, the child layer by layer, tables, curves. With two reports: both side by side."""
    if not reports:
        MADE.call(recipe, config, set_, parent, data, store, debug)
        return
    if len(reports) != 2:
        raise ConfigError("report-run", f"{len(reports)} report is given", "name two to compare, or none for the run's own page")
    from jobs.command import loaded
    from puzzle_ray.report.compare import compare

    root = store or loaded(recipe, config, set_, parent, data, store).store
    found = [read_summary(name, root) for name in reports]
    try:
        with open(out, "w", encoding="utf-8") as file:
            file.write(compare(found, reports))
    except OSError as error:
        raise ConfigError(
            "--out", f"{out!r} cannot be written ({error.strerror})", "name a file in a folder that is there"
        ) from None
    print(out)


def read_summary(name: str, root: str) -> Any:
    """A finished report's figures. Raises StoreError."""
    from jobs.store import opened
    from puzzle_ray.errors import StoreError
    from puzzle_ray.report.summary import SUMMARY, checked
    from puzzle_ray.store import artifact_at
    from puzzle_ray.store.upkeep import artifact_named

    if "/" in name:
        at = artifact_at(name)
        if at is None or at[1]:
            raise StoreError("report-run", f"{name!r} is no report", "name the folder of one, such as runs/report-0123456789ab")
        artifact = at[0]
    else:
        artifact = artifact_named(opened(root), name)
    if artifact.stage != "report" or not artifact.finished:
        raise StoreError("report-run", f"{name!r} is no finished report", "name one that `puzzle-ray store ls` shows as finished")
    if not artifact.exists(SUMMARY):
        remedy = "it was made by an older version: remove it by `store gc`, then run report-run with its run's settings"
        raise StoreError("report-run", f"{name!r} has no {SUMMARY}", remedy)
    return checked(artifact.read_json(SUMMARY), name)


VERB = Verb("report-run", RESULTS, report_run)

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
