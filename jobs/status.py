"""Show every stage of a config: finished or not, and why it would run. Does nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from jobs.command import SEARCHES, Config, Data, Debug, ParentName, Recipe, Settings, StoreRoot, Verb, configured
from jobs.run import NotDone, Run, Stage, in_order, stages
from puzzle_ray.store import RECORD, Artifact, Store

MOST_CHANGES = 3  # that are named; the others are counted


@dataclass(frozen=True)
class Row:
    """One stage: its state, `finished`, `begun` or `to do`, and in words why it would run or where its result is."""

    stage: str
    state: str
    words: str


def rows(run: Run) -> list[Row]:
    """Every stage in the order in which they run. Nothing is done, and nothing is written."""
    found: list[Row] = []
    would_run: set[str] = set()
    for stage in in_order(stages(), run.config):
        found.append(_row(run, stage, would_run))
        if found[-1].state != "finished":
            would_run.add(stage.name)
    return found


def _row(run: Run, stage: Stage, would_run: set[str]) -> Row:
    try:
        artifact = run.artifact(stage.name)
    except NotDone as missing:
        return Row(stage.name, "to do", f"what it does depends on the result of {missing.stage}")
    if artifact.finished:
        return Row(stage.name, "finished", artifact.url)
    state = "begun" if artifact.names() else "to do"
    waits = [name for name in (*stage.inputs, *stage.reads) if name in would_run]
    return Row(stage.name, state, "; ".join(_why(run.store, artifact, waits)))


def _why(store: Store, artifact: Artifact, waits: list[str]) -> Iterator[str]:
    if artifact.names():
        yield f"not finished yet: {artifact.url}"
    record = closest_record(store, artifact)
    if record is None:
        yield "no such stage in this store yet"
        return
    changes = list(differences(record, artifact))
    inputs = [name for name in waits if any(text == f"input {name}" for text in changes)]
    changes = [text for text in changes if text.removeprefix("input ") not in inputs]
    if inputs:
        yield f"reads {', '.join(inputs)}, which would run"
    if changes:
        more = f" and {len(changes) - MOST_CHANGES} more" if len(changes) > MOST_CHANGES else ""
        yield f"changed: {', '.join(changes[:MOST_CHANGES])}{more} (since {store.root}/{artifact.stage}-{record['key']})"


def closest_record(store: Store, artifact: Artifact) -> Mapping[str, Any] | None:
    """The record of the finished artifact of the same stage that differs least."""
    filesystem = store.filesystem
    if not filesystem.isdir(store.root):
        return None
    names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in filesystem.ls(store.root, detail=False))
    found = []
    for name in sorted(name for name in names if name.startswith(f"{artifact.stage}-")):
        try:
            found.append(json.loads(filesystem.cat_file(f"{store.root}/{name}/{RECORD}")))
        except (OSError, ValueError):  # not finished
            continue
    return min(found, key=lambda record: len(list(differences(record, artifact))), default=None)


def differences(record: Mapping[str, Any], artifact: Artifact) -> Iterator[str]:
    """What an earlier artifact's settings and inputs have otherwise: `scoring.tokens 8192 -> 4096`, `input library`."""
    before, now = dict(_flat(record["settings"])), dict(_flat(json.loads(json.dumps(artifact.settings))))
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            yield f"{name} {_shown(before, name)} -> {_shown(now, name)}"
    inputs = record["inputs"]
    for name in dict.fromkeys([*inputs, *artifact.inputs]):
        if inputs.get(name) != artifact.inputs.get(name):
            yield f"input {name}"


def _flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in nested settings."""
    if not isinstance(settings, Mapping):
        yield prefix, settings
        return
    for name, value in settings.items():
        yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))


def _shown(settings: Mapping[str, Any], name: str) -> str:
    text = json.dumps(settings[name]) if name in settings else "nothing"
    return text if len(text) <= 40 else f"{text[:37]}..."


def status(
    recipe: Recipe = None,
    config: Config = None,
    set_: Settings = None,
    parent: ParentName = None,
    data: Data = None,
    store: StoreRoot = None,
    debug: Debug = False,
) -> None:
    """Show every stage of a config: finished or not, and why it would run. Does nothing."""
    from jobs.session import connected, joins

    run = configured(recipe, config, set_, parent, data, store)
    with (
        connected(run.config.cluster) if joins(run.config.cluster) else nullcontext()
    ):  # which nodes will measure is part of a key
        found = rows(run)
    width = max(len(row.stage) for row in found)
    for row in found:
        print(f"{row.stage:<{width}}  {row.state:<8}  {row.words}")


VERB = Verb("status", SEARCHES, status)

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
