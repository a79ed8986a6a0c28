"""Looking after a whole store: what is in it, whether it is whole, what it takes, and what may go."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puzzle_ray.errors import StoreError
from puzzle_ray.store import scratch
from puzzle_ray.store.address import NAME, artifact_in
from puzzle_ray.store.artifact import Artifact, Store
from puzzle_ray.store.lease import DEAD_AFTER_S, LEASES, leases, remove_lease
from puzzle_ray.store.record import RECORD, Problem, State
from puzzle_ray.store.root import LOGS

DAY_S = 24 * 3600.0
READ_BY_ALL = ("hardware",)  # stages whose result every run of a parent reads, though nobody names it as an input


@dataclass(frozen=True)
class Listed:
    """An artifact in a list. `bytes` counts every file in its folder; `written_at`: when one was last written, in seconds since 1970."""

    stage: str
    key: str
    url: str
    state: State
    bytes: int
    written_at: float
    finished_at: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.key}"


@dataclass(frozen=True)
class Garbage:
    """Something that may go: its name in the store, why, and how many bytes that frees."""

    name: str
    why: str
    bytes: int


def artifact_named(store: Store, name: str) -> Artifact:
    """The artifact of a folder's name. Its settings and inputs are those of its record. Raises StoreError for what is none."""
    if not NAME.fullmatch(name):
        raise StoreError("store", f"{name!r} names no artifact", "name a folder such as library-0123456789ab, as `ls` shows them")
    artifact = artifact_in(store, name)
    if artifact.state() == "absent":
        raise StoreError("store", f"there is no {name!r} in {store.root}", "name one that `ls` shows")
    return artifact


def artifacts(store: Store) -> list[Listed]:
    """Everything in the store, finished or not, the last written first. Reads records only."""
    found = [_listed(artifact) for artifact in _folders(store)]
    return sorted((one for one in found if one.state != "absent"), key=lambda listed: -listed.written_at)


def verify(store: Store, names: Iterable[str] = ()) -> dict[str, list[Problem]]:
    """Name -> what is wrong, of all artifacts or of those that are named. Reads every file."""
    asked = list(names) or [listed.name for listed in artifacts(store)]
    return {name: artifact_named(store, name).verify() for name in asked}


def bytes_by_stage(store: Store) -> dict[str, int]:
    """The stage that takes most first."""
    found: dict[str, int] = {}
    for listed in artifacts(store):
        found[listed.stage] = found.get(listed.stage, 0) + listed.bytes
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def collect_garbage(store: Store, older_than_days: float = 30.0, *, dry_run: bool = True) -> list[Garbage]:
    """What is not needed and was last written more than `older_than_days` ago: artifacts that no finished artifact names as an input,
    and unfinished ones, and logs of runs; also scratch and leases of dead processes, however old. Removes it unless `dry_run`; returns
    what went or would go. What a run works on stays.
    """
    found = [*_unneeded(store, older_than_days, dry_run), *_old_logs(store, older_than_days, dry_run), *_probes(store, dry_run)]
    whole = {garbage.name for garbage in found}  # with all that is in them, so that nothing counts twice
    for artifact in _folders(store):
        found += _leftovers(store, artifact, dry_run) if artifact.name not in whole else []
    return found + _dead_leases(store, dry_run)


def _folders(store: Store) -> list[Artifact]:
    return [artifact_in(store, name) for name in store.names(store.root) if NAME.fullmatch(name)]


def _listed(artifact: Artifact) -> Listed:
    record, sizes = artifact.record(fresh=True), artifact.store.sizes(artifact.url)
    return Listed(
        artifact.stage,
        artifact.key,
        artifact.url,
        artifact.state(),
        sum(sizes.values()),
        max((_written_at(artifact.store, artifact.path(name)) for name in ([RECORD] if RECORD in sizes else sizes)), default=0.0),
        record.finished_at if record else "",
        record.facts if record else {"record": problem} if (problem := artifact.record_problem()) else {},
        record.inputs if record else {},
    )


def _written_at(store: Store, path: str) -> float:
    """Now, where the backend does not tell: nothing there is ever old."""
    try:
        return float(store.filesystem.modified(path).timestamp())
    except FileNotFoundError:
        return 0.0
    except NotImplementedError:
        return time.time()


def _unneeded(store: Store, older_than_days: float, dry_run: bool) -> list[Garbage]:
    listed, held = artifacts(store), {found.file.rpartition(".")[0] for found in leases(store) if not found.is_dead_here}
    inputs = [text for one in listed if one.state == "finished" for text in one.inputs.values()]
    oldest, found = time.time() - older_than_days * DAY_S, []
    for one in listed:
        needed = one.state in ("finished", "damaged") and (
            one.stage in READ_BY_ALL or any(one.key in str(text) for text in inputs)
        )
        read_now = (
            bool(held) and one.state == "finished"
        )  # what a run reads is known to its record alone, which it has not written yet
        if needed or read_now or one.written_at > oldest or one.name in held:
            continue
        why = "no finished artifact was made from it" if one.state == "finished" else f"it is {one.state}"
        if dry_run or _removed(store, one):
            found.append(Garbage(one.name, why, one.bytes))
    return found


def _old_logs(store: Store, older_than_days: float, dry_run: bool) -> list[Garbage]:
    """Logs that no run has written to lately: one that runs writes every few seconds, and is spared for a day whatever is asked."""
    oldest, found = time.time() - max(older_than_days, 1.0) * DAY_S, []
    for run_id in store.names(f"{store.root}/{LOGS}"):
        url = f"{store.root}/{LOGS}/{run_id}"
        sizes = store.sizes(url)
        if max((_written_at(store, f"{url}/{name}") for name in sizes), default=0.0) < oldest:
            found.append(Garbage(f"{LOGS}/{run_id}", "the log of a run of long ago", sum(sizes.values())))
            if not dry_run:
                store.filesystem.rm(url, recursive=True)
    return found


def _removed(store: Store, listed: Listed) -> bool:
    """False where a run has begun to work on it."""
    artifact = artifact_named(store, listed.name)
    try:
        with artifact.lease(timeout_s=0.0):
            if artifact.state() == listed.state:
                store.filesystem.rm(artifact.url, recursive=True)
                return True
    except StoreError:
        pass
    return False


def _leftovers(store: Store, artifact: Artifact, dry_run: bool) -> list[Garbage]:
    """Scratch of dead processes in an artifact's folder; in a finished one that nobody works on, whatever is hidden."""
    found = []
    held = any(lease.file.rpartition(".")[0] == artifact.name and not lease.is_dead_here for lease in leases(store))
    idle = not held and artifact.state() == "finished"
    for name in store.names(artifact.url):
        path = artifact.path(name)
        dead = store.is_local and name.count("~") >= 3 and scratch.is_abandoned(Path(path))
        if name.startswith(".") and (dead or idle):
            size = sum(store.sizes(path).values()) or int(store.filesystem.info(path).get("size") or 0)
            found.append(Garbage(f"{artifact.name}/{name}", "no process works on it", size))
            if not dry_run:
                store.filesystem.rm(path, recursive=True)
    return found


def _probes(store: Store, dry_run: bool) -> list[Garbage]:
    found = []
    for name in store.names(store.root):
        path = f"{store.root}/{name}"
        if name.startswith(".probe"):
            dead = scratch.is_abandoned(Path(path)) if store.is_local and name.count("~") >= 3 else False
            if dead or time.time() - _written_at(store, path) > DAY_S:
                found.append(Garbage(name, "a check of the store was killed", int(store.filesystem.info(path).get("size") or 0)))
                if not dry_run:
                    store.filesystem.rm_file(path)
    return found


def _dead_leases(store: Store, dry_run: bool) -> list[Garbage]:
    """Of dead processes of this machine, and those that were not renewed for a day."""
    found = []
    for lease in leases(store):
        path = f"{store.root}/{LEASES}/{lease.file}"
        if lease.is_dead_here or time.time() - _written_at(store, path) > max(DAY_S, DEAD_AFTER_S):
            found.append(Garbage(f"{LEASES}/{lease.file}", f"{lease.words}, is gone", len(lease.content)))
            if not dry_run:
                remove_lease(store, lease)
    return found
