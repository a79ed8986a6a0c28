"""Watches whether a node's object store goes on on disk, which Ray does silently and slowly."""

from __future__ import annotations

import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from threading import Event, Thread
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError

from actors.data_plane import MIB

DIRECT = urllib.request.ProxyHandler({})  # a proxy would answer for the node, or not reach it
GROWTH = 10  # a node's next warning is due when it has spilled so many times as much
PATIENCE = 3  # looks without figures after which a node is no longer asked


@dataclass
class SpillWatch:
    """A thread that reads Ray's own figures of every node's store, from the nodes' metrics endpoints, for as long as a stage runs.

    `nodes` says whose stores matter. A store that moves objects to disk is a warning on stderr: the run goes on, only slower.
    """

    nodes: Callable[[], Iterable[str]]
    every_s: float = 10.0  # as often as Ray refreshes them
    before: dict[str, float] = field(default_factory=dict)
    warn_at: dict[str, float] = field(default_factory=dict)  # bytes on disk
    silent: Counter[str] = field(default_factory=Counter)  # how often a node gave no figures
    ended: Event = field(default_factory=Event)
    thread: Thread | None = None

    def __enter__(self) -> SpillWatch:
        self.thread = Thread(target=self._watch, name="spill watch", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.ended.set()
        if self.thread:
            self.thread.join(timeout=10)

    def _watch(self) -> None:
        while not self.ended.is_set():
            try:
                self.look()
            except RayError as error:  # the stage itself meets it too
                _warn(f"the nodes' object stores are not watched for a moment ({type(error).__name__})")
            self.ended.wait(self.every_s)

    def look(self) -> None:
        """At all nodes once."""
        wanted = set(self.nodes())
        for node in ray.nodes():
            if self.ended.is_set():
                return
            if node["Alive"] and node["NodeID"] in wanted and self.silent[node["NodeID"]] < PATIENCE:
                self._look_at(node)

    def _look_at(self, node: Mapping[str, Any]) -> None:
        name, address = node["NodeID"], f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
        try:
            with urllib.request.build_opener(DIRECT).open(f"http://{address}/metrics", timeout=2) as answer:
                on_disk = bytes_on_disk(answer.read().decode())
        except (OSError, HTTPException, ValueError, OverflowError) as error:  # no such port at all is among them
            self.silent[name] += 1
            if self.silent[name] == PATIENCE:
                where = f"node {node['NodeManagerAddress']}"
                _warn(f"{where} gives no metrics ({error}): whether its object store spills is not watched")
            return
        self.silent[name] = 0
        self.before[name] = min(on_disk, self.before.get(name, on_disk))
        spilled = on_disk - self.before[name]
        if spilled > 0 and spilled >= self.warn_at.get(name, 0.0):
            self.warn_at[name] = GROWTH * spilled
            _warn(
                f"the object store of node {node['NodeManagerAddress']} is full: {spilled / MIB:.1f} MiB went to its disk, which is slow; "
                "something else fills it too: start Ray with a larger --object-store-memory, or lower library.window"
            )


def _warn(text: str) -> None:
    print(f"  library: warning: {text}", file=sys.stderr, flush=True)


def bytes_on_disk(metrics: str) -> float:
    """Spilled objects, and those allocated on disk at once, in a node's metrics. Raises ValueError where they are not told."""
    found = [
        float(line.rsplit(" ", 1)[1])
        for line in metrics.splitlines()
        if line.startswith("ray_object_store_memory{") and ('Location="SPILLED"' in line or 'Location="MMAP_DISK"' in line)
    ]
    if not found:
        raise ValueError("nothing about its object store")
    return sum(found)
