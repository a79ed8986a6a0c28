"""Nodes that are about to go, and are left in time.

Ray is told so before it happens: by `ray drain-node`, which whoever hears of a preemption calls, or by an autoscaler. It then puts nothing
new on the node, and that is all that its public interface tells of it; so it is asked with a task that no other node may run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Event, Thread
from types import TracebackType

import ray
from ray.exceptions import RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.placement import LEAVING, all_nodes

EVERY_S = 5.0
ANSWERS_WITHIN_S = 5.0


@ray.remote(num_cpus=0, max_retries=0)
def _nothing() -> None:
    """Is either run by the node that it is for, or refused."""


def is_leaving(node_id: str) -> bool:
    """Whether a live node takes nothing new. A node that is too busy to answer is not leaving."""
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    try:
        ray.get(_nothing.options(scheduling_strategy=there).remote(), timeout=ANSWERS_WITHIN_S)
    except TaskUnschedulableError:
        return node_id in {node["NodeID"] for node in all_nodes()}
    except RayError:
        return False
    return False


@dataclass
class LeavingNodes:
    """A thread that asks the nodes of a stage, for as long as it runs, and notes those that leave for all that is placed after it.

    `nodes` says whose; `move` is asked once for each whether there is anywhere else to go. Where there is only one node nobody is asked.
    """

    nodes: Callable[[], Iterable[str]]
    move: Callable[[str], bool]
    found: Event = field(default_factory=Event)
    ended: Event = field(default_factory=Event)
    thread: Thread | None = None

    def __enter__(self) -> LeavingNodes:
        self.thread = Thread(target=self._watch, name="leaving nodes", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.ended.set()
        if self.thread:
            self.thread.join(timeout=2 * ANSWERS_WITHIN_S)

    def _watch(self) -> None:
        while not self.ended.wait(EVERY_S) and not self.found.is_set():
            try:
                self.look()
            except RayError:  # the stage itself meets it too
                continue

    def look(self) -> None:
        """Asks all nodes once."""
        if sum(bool(node["Resources"].get("CPU")) for node in all_nodes()) < 2:
            return
        for node_id in set(self.nodes()) - LEAVING:
            if not self.ended.is_set() and is_leaving(node_id):
                LEAVING.add(node_id)
                if self.move(node_id):
                    self.found.set()
