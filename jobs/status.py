"""Show every stage of a config: finished or not, and why it would run. Does nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jobs.command import SEARCHES, Config, Data, Debug, ParentName, Recipe, Settings, StoreRoot, Verb, configured
from jobs.run import OF_ORIGINAL, NotDone, Run, Stage, in_order, stages
from jobs.store import is_there
from puzzle_ray.errors import ClusterError, ProfileError
from puzzle_ray.store import RECORD, Artifact, Store
from puzzle_ray.store.files import for_each

MOST_CHANGES = 3  # that are named; the others are counted
Record = Mapping[str, Any]  # as it is written
IN_WORDS = ("engine", "target")  # inputs that a reader understands; the others are keys and hashes


@dataclass(frozen=True)
class Row:
    """One stage: its state, `finished`, `begun` or `to do`, and in words why it would run or where its result is.

    Where there are several rounds, `stage` says which one it is of: `2 library`.
    """

    stage: str
    state: str
    words: str


def rows(run: Run) -> list[Row]:
    """Every stage of every round in the order in which they run. Nothing is done, and nothing is written. Raises StoreError where the
    store cannot be read."""
    is_there(run.store)
    records = Records(run.store)
    if run.config.rounds == 1:
        return _rows_of(run, in_order(stages(), run.config), records)
    found: list[Row] = []
    for number in range(1, run.config.rounds + 1):
        last = number == run.config.rounds
        order = in_order(stages() if last else ("gkd",), run.config)
        own = [stage for stage in order if number == 1 or stage.name not in OF_ORIGINAL or (last and stage.name == "sweep")]
        found += [replace(row, stage=f"{number} {row.stage}") for row in _rows_of(run, own, records)]
        run = run if last else run.next_round
    return found


def _rows_of(run: Run, order: Sequence[Stage], records: Records) -> list[Row]:
    found: list[Row] = []
    would_run: set[str] = set()
    of_no_device: set[str] = set()  # nobody is asked for the device again on their behalf
    for stage in order:
        try:
            before = sorted(of_no_device & {*stage.inputs, *stage.reads})
            found.append(_needs(stage, before[0]) if before else _row(run, stage, would_run, records))
        except (ClusterError, ProfileError) as error:
            of_no_device.add(stage.name)
            found.append(Row(stage.name, "to do", f"which device measures is not known: {error}"))
        if of_no_device & {*stage.inputs, *stage.reads}:
            of_no_device.add(stage.name)
        if found[-1].state != "finished":
            would_run.add(stage.name)
    return found


def _row(run: Run, stage: Stage, would_run: set[str], records: Records) -> Row:
    try:
        artifact = run.artifact(stage.name)
    except NotDone as missing:
        return _needs(stage, missing.stage)
    if artifact.finished:
        return Row(stage.name, "finished", artifact.url)
    state = "begun" if artifact.names() else "to do"
    waits = [name for name in (*stage.inputs, *stage.reads) if name in would_run]
    return Row(stage.name, state, "; ".join(_why(records, artifact, waits, _parent_of(run, stage))))


def _parent_of(run: Run, stage: Stage) -> str | None:
    """What identifies the model that a stage is of; None where it reads none that is there."""
    try:
        return (run.original if stage.name in OF_ORIGINAL else run).parent.key
    except NotDone:
        return None


def _needs(stage: Stage, other: str) -> Row:
    return Row(stage.name, "to do", f"what it does depends on the result of {other}")


def _why(records: Records, artifact: Artifact, waits: list[str], parent: str | None) -> Iterator[str]:
    if artifact.names():
        yield f"not finished yet: {artifact.url}"
    record = records.closest(artifact, parent)
    if record is None:
        yield f"no such stage{' of this parent' if records.of_stage(artifact.stage) else ''} in this store yet"
        return
    changes = list(differences(record, artifact))
    inputs = [name for name in waits if any(text == f"input {name}" for text in changes)]
    changes = [text for text in changes if text.removeprefix("input ") not in inputs]
    if inputs:
        yield f"reads {', '.join(inputs)}, which would run"
    if changes:
        more = f" and {len(changes) - MOST_CHANGES} more" if len(changes) > MOST_CHANGES else ""
        yield f"changed: {', '.join(changes[:MOST_CHANGES])}{more} (since {records.store.root}/{artifact.stage}-{record['key']})"


class Records:
    """The records of a store's finished artifacts. Each is read once, on a remote store several at a time: there may be thousands."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._known: dict[str, Record | None] = {}

    @cached_property
    def _names(self) -> list[str]:
        return self.store.names(self.store.root)

    def of_stage(self, stage: str) -> list[Record]:
        """Those of all finished artifacts of a stage, by name."""
        names = [name for name in self._names if name.startswith(f"{stage}-")]
        return [record for record in for_each(self.store, self.of, names) if record is not None]

    def of(self, name: str) -> Record | None:
        """None for an artifact that is not finished."""
        if name not in self._known:
            self._known[name] = self._read(name)
        return self._known[name]

    def _read(self, name: str) -> Record | None:
        try:
            record = json.loads(self.store.filesystem.cat_file(f"{self.store.root}/{name}/{RECORD}"))
        except (OSError, ValueError):
            return None
        whole = isinstance(record, dict) and isinstance(record.get("inputs"), dict) and {"settings", "key"} <= record.keys()
        return record if whole else None

    def closest(self, artifact: Artifact, parent: str | None) -> Record | None:
        """Of the finished artifacts of the same stage the one that differs least: of those for this parent or, where there is none, of
        those whose parent is not known any more. `parent` is None for a stage that has none."""
        records = self.of_stage(artifact.stage)
        made = for_each(self.store, self.made_for, records) if parent else [None] * len(records)
        of_parent = [record for of, record in zip(made, records, strict=True) if of == parent]
        own = of_parent or [record for of, record in zip(made, records, strict=True) if of is None]
        return min(own, key=lambda record: len(list(differences(record, artifact))), default=None)

    def made_for(self, record: Record) -> str | None:
        """What identifies the parent of a finished artifact, found along what it read; None where that is not in the store any more."""
        found: Record | None = record
        while found is not None:
            inputs: Mapping[str, str] = found["inputs"]
            if "parent" in inputs:
                return inputs["parent"]
            read = [f"{name}-{key}" for name, key in inputs.items() if name in stages() and name not in OF_ORIGINAL]
            found = next((earlier for name in read if (earlier := self.of(name))), None)
        return None


def differences(record: Mapping[str, Any], artifact: Artifact) -> Iterator[str]:
    """What an earlier artifact's settings and inputs have otherwise: `scoring.tokens 8192 -> 4096`, `input library`,
    `input target CPU A -> CPU B`."""
    before, now = dict(_flat(record["settings"])), dict(_flat(json.loads(json.dumps(artifact.settings))))
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            yield f"{name} {_shown(before, name)} -> {_shown(now, name)}"
    before, now = record["inputs"], artifact.inputs
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            words = f" {before[name]} -> {now[name]}" if name in IN_WORDS and name in before and name in now else ""
            yield f"input {name}{words}"


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
    """Show every stage of a config: finished or not, and why it would run; before that, what `hardware: auto` decides. Does nothing."""
    from jobs.hardware import settled
    from jobs.session import connected, joins

    run = configured(recipe, config, set_, parent, data, store)
    cluster = run.config.cluster
    if joins(cluster):  # the node that will measure is asked, and not waited for as long as for work
        soon = {"placement_timeout_s": min(cluster.connect_timeout_s, cluster.placement_timeout_s)}
        run = Run(run.config.model_copy(update={"cluster": cluster.model_copy(update=soon)}), run.progress)
    with connected(cluster) if joins(cluster) else nullcontext():
        run = settled(run, notes=False, quiet=True)
        found = rows(run)
    for line in run.decided:
        print(line)
    width = max(len(row.stage) for row in found)
    for row in found:
        print(f"{row.stage:<{width}}  {row.state:<8}  {row.words}")


VERB = Verb("status", SEARCHES, status)

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
