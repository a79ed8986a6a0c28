"""The log of a run: one JSON object a line, in `log/<run id>` of its store, where another process can follow it.

Every line has `time` (UTC), `run` and `event`. Lines are appended to a local file at once. An object store knows no appending: there a
part is written again and again until it is full.
"""

from __future__ import annotations

import json
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from puzzle_ray.store.root import LOGS, Root

PART_BYTES = 256 << 10
SILENT_AFTER_S = 90.0  # a run that wrote nothing for so long is not alive, or cannot reach the store


def new_run_id() -> str:
    """Sorts by time, to the millisecond: `20260102-030405-678-1a2b`, in UTC."""
    return f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S-%f}"[:-3] + f"-{uuid.uuid4().hex[:4]}"


class RunLog:
    """Writes the log of one run. Where the store cannot be written, that is said once, and the run goes on.

    On an object store `event` writes nothing: whoever calls `flush` now and then waits for the store, and nobody else does.
    """

    def __init__(self, store: Root, run_id: str) -> None:
        self.store, self.run_id = store, run_id
        self.url = f"{store.root}/{LOGS}/{run_id}"
        self.lines_lock, self.write_lock = threading.Lock(), threading.Lock()
        self.parts: list[list[str]] = [[]]  # what is not written yet, or not for the last time; the last part grows
        self.first = 0  # the number of the first of them
        self.num_bytes = 0  # of the last part
        self.said = False  # that it cannot be written

    def event(self, name: str, **facts: Any) -> None:
        """One line."""
        now = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z"
        line = json.dumps({"time": now, "run": self.run_id, "event": name} | facts, default=str) + "\n"
        with self.lines_lock:
            if self.num_bytes > PART_BYTES:
                self.parts.append([])
                self.num_bytes = 0
            self.parts[-1].append(line)
            self.num_bytes += len(line)
        if self.store.is_local:
            self.flush()

    def flush(self) -> None:
        """Everything that was said is in the store after this. What could not be written is tried again with the next flush."""
        with self.write_lock:
            with self.lines_lock:
                parts, first = [list(part) for part in self.parts], self.first
            for number, part in enumerate(parts, first):
                if part and not self._guarded(partial(self._write, f"events.{number:04d}.jsonl", "".join(part))):
                    return
            with self.lines_lock:
                self.parts, self.first = self.parts[len(parts) - 1 :], first + len(parts) - 1
                if self.store.is_local:
                    del self.parts[0][: len(parts[-1])]

    def write_file(self, name: str, data: bytes) -> None:
        """A file beside the log, in the place of one of the same name."""
        with self.write_lock:
            self._guarded(partial(self._put, name, data))

    def put_folder(self, folder: Path, name: str) -> None:
        """Copies the files of a local folder beside the log."""
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.write_file(f"{name}/{file.relative_to(folder).as_posix()}", file.read_bytes())

    def _write(self, name: str, text: str) -> None:
        if not self.store.is_local:
            self._put(name, text.encode())
            return
        Path(self.url).mkdir(parents=True, exist_ok=True)
        with open(f"{self.url}/{name}", "a", encoding="utf-8") as file:
            file.write(text)

    def _put(self, name: str, data: bytes) -> None:
        path = f"{self.url}/{name}"
        self.store.filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        self.store.filesystem.pipe_file(path, data)

    def _guarded(self, write: Callable[[], None]) -> bool:
        try:
            write()
        except Exception as error:  # every backend has errors of its own
            if not self.said:
                self.said = True
                problem = f"{type(error).__name__}: {error}"
                print(f"  the log {self.url} cannot be written ({problem}); the run goes on", file=sys.stderr, flush=True)
            return False
        return True


def run_ids(store: Root) -> list[str]:
    """Of all runs that have a log in this store, the oldest first."""
    return store.names(f"{store.root}/{LOGS}")


def read_events(store: Root, run_id: str) -> list[dict[str, Any]]:
    """All lines of a run's log. A last line that is being written is left out."""
    found = []
    folder = f"{store.root}/{LOGS}/{run_id}"
    for name in store.names(folder):
        if name.startswith("events."):
            for line in bytes(store.filesystem.cat_file(f"{folder}/{name}")).decode().splitlines():
                try:
                    found.append(dict(json.loads(line)))
                except ValueError:
                    continue
    return found


@dataclass
class StageState:
    """A stage of a run as its log tells it. `state`: `running`, `finished`, or `already there`."""

    name: str
    state: str
    began: float
    seconds: float | None = None
    bytes: int = 0  # of its artifact
    bars: dict[str, dict[str, Any]] = field(default_factory=dict)  # what is under way in it, by name


@dataclass
class RunState:
    """A run as its log tells it: what a person who looks after it wants to know. Times are seconds since 1970."""

    run_id: str
    facts: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, StageState] = field(default_factory=dict)
    artifacts: dict[str, int] = field(default_factory=dict)  # bytes of each; a stage may have several, as in rounds and sweeps
    cluster: dict[str, Any] = field(default_factory=dict)
    ended: dict[str, Any] | None = None
    began: float = 0.0
    heard: float = 0.0

    def words(self, now: float) -> str:
        """How it is with the run."""
        if self.ended is not None:
            error = f": {self.ended['error']}" if self.ended.get("error") else ""
            return f"{self.ended['how']}{error}"
        silence = now - self.heard
        return "running" if silence < SILENT_AFTER_S else f"silent for {silence:.0f} s: it died, or does not reach the store"


def state_of(run_id: str, events: Iterable[Mapping[str, Any]]) -> RunState:
    """What the lines of a log add up to."""
    state = RunState(run_id)
    for event in events:
        when = _seconds(event["time"])
        state.heard = max(state.heard, when)
        state.began = state.began or when
        _take(state, dict(event), when)
    return state


def _take(state: RunState, event: dict[str, Any], when: float) -> None:
    name, stage = event.pop("event"), event.get("stage", "")
    if name == "run_begun":
        state.facts = event
    elif name == "run_ended":
        state.ended = event
    elif name == "cluster":
        state.cluster = event
    elif name == "stage_begun":
        state.stages[stage] = StageState(stage, "running", when)
    elif name == "stage_finished":
        known = state.stages.setdefault(stage, StageState(stage, "running", when))
        known.state = "finished" if event.get("did", True) else "already there"
        known.seconds, known.bytes = event.get("seconds"), event.get("bytes", 0)
        known.bars = {}
        state.artifacts[event.get("artifact", stage)] = known.bytes
    elif name == "progress" and stage in state.stages:
        state.stages[stage].bars[event["bar"]] = event
    elif name == "bar_closed" and stage in state.stages:
        state.stages[stage].bars.pop(event["bar"], None)


def _seconds(text: str) -> float:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc).timestamp()
