"""Who runs where: layers over shards and trainers, what the nodes have, waiting for actors with a limit, and ending them."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError

from puzzle_ray.errors import ClusterError

DIED = (RayActorError, OutOfMemoryError)  # what the calls of an actor raise whose process is gone
LABEL = "[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
SELECTOR = re.compile(rf"(?:!?(?:in\({LABEL}(?:, ?{LABEL})*\)|{LABEL}))?")


def cluster_cpus() -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def runs(num_items: int, num_groups: int) -> list[range]:
    """`num_items` in `num_groups` contiguous runs whose lengths differ by at most one."""
    num_groups = max(1, min(num_groups, num_items))
    edges = [num_items * i // num_groups for i in range(num_groups + 1)]
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def matching_nodes(resources: Mapping[str, float], labels: Mapping[str, str] | None = None) -> list[Mapping[str, Any]]:
    """Live nodes that have so much of every resource, in use or not, and whose labels are those of a Ray label selector."""
    return [
        node
        for node in ray.nodes()
        if node["Alive"]
        and all(node["Resources"].get(name, 0) >= amount for name, amount in resources.items())
        and all(_selects(wanted, node.get("Labels", {}).get(name)) for name, wanted in (labels or {}).items())
    ]


def _selects(wanted: str, value: str | None) -> bool:
    """Ray's label operators: `a`, `!a`, `in(a, b)`, `!in(a, b)`; a missing label matches the negative ones."""
    negative, text = wanted.startswith("!"), wanted.removeprefix("!")
    listed = re.fullmatch(r"in\((.*)\)", text)
    values = [word.strip() for word in listed.group(1).split(",")] if listed else [text]
    return (value in values) != negative


def places(options: Mapping[str, Any]) -> int:
    """How many actors with these Ray options the cluster's live nodes can hold at once, were nothing else running there."""
    resources = resources_of(options)
    found = matching_nodes(resources, options.get("label_selector"))
    return sum(min(int(node["Resources"][name] / amount + 1e-6) for name, amount in resources.items()) for node in found)


def resources_of(options: Mapping[str, Any]) -> dict[str, float]:
    """What an actor with these options takes, by Ray's names; never nothing at all."""
    wanted = {"CPU": options.get("num_cpus", 0), "GPU": options.get("num_gpus", 0), **options.get("resources", {})}
    return {name: float(amount) for name, amount in wanted.items() if amount} or {"memory": 1.0}


def require(options: Mapping[str, Any], what: str, where: str, autoscaling: bool) -> int:
    """How many actors with these options have room. Raises ClusterError at once where there is no node for a single one,
    or for a label selector that Ray does not know.
    """
    for name, wanted in options.get("label_selector", {}).items():
        if not SELECTOR.fullmatch(wanted):
            raise ClusterError(where, f"label_selector: {name}: {wanted!r} selects nothing", "write a, !a, in(a, b) or !in(a, b)")
    room = places(options)
    if room == 0 and not autoscaling:
        asked = resources_of(options) | dict(options.get("label_selector", {}))
        problem = f"no node can hold {what} with {in_words(asked)}; the cluster has {nodes_in_words()}"
        raise ClusterError(
            where, problem, "ask for what there is, or set cluster.autoscaling where such nodes are added on demand"
        )
    return room


def nodes_in_words() -> str:
    """Resources and labels of every live node, equal nodes counted: `2 x {CPU: 8, H100: 1, ray.io/accelerator-type: H100}`."""
    described: Counter[str] = Counter()
    for node in ray.nodes():
        if node["Alive"]:
            hidden = ("node:", "object_store_memory", "memory")
            facts = {k: v for k, v in sorted(node["Resources"].items()) if not k.startswith(hidden)}
            facts |= {k: v for k, v in sorted(node.get("Labels", {}).items()) if k != "ray.io/node-id"}
            described["{" + in_words(facts) + "}"] += 1
    return ", ".join(f"{count} x {words}" if count > 1 else words for words, count in sorted(described.items()))


def in_words(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {value:g}" if isinstance(value, float) else f"{name}: {value}" for name, value in facts.items())


def not_placed(what: str, timeout_s: float) -> ClusterError:
    """The error for what the cluster did not start in time."""
    free = ray.available_resources().get("CPU", 0)
    problem = f"{what} did not start within {timeout_s:g} s; the cluster has {nodes_in_words()}; {free:g} CPUs are free"
    return ClusterError("cluster", problem, "ask for less, add nodes, or raise cluster.placement_timeout_s")


def not_started(what: str, error: RayError) -> ClusterError:
    """The error for an actor whose process could not begin."""
    reason = str(error).strip().splitlines()[-1]
    return ClusterError("cluster", f"{what} could not start ({reason})", "see the worker's log in Ray's session folder")


def wait_ready(actors: Sequence[ActorHandle[Any]], what: str, timeout_s: float) -> None:
    """Until every actor has answered. Raises ClusterError naming what the cluster has when they cannot all be placed in time."""
    try:
        ray.get([actor.pid.remote() for actor in actors], timeout=timeout_s)
    except GetTimeoutError:
        raise not_placed(f"{len(actors)} {what}", timeout_s) from None
    except DIED as error:
        raise not_started(what, error) from None


def end(actors: Sequence[ActorHandle[Any]], timeout_s: float = 3.0) -> None:
    """Kills actors for good and waits a little for their resources to be free again."""
    for actor in actors:
        ray.kill(actor, no_restart=True)
    if actors:
        await_free_cpus(timeout_s)


def await_free_cpus(timeout_s: float = 3.0) -> None:
    """Until all CPUs are free, or until the time is up."""
    total = ray.cluster_resources().get("CPU", 0)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and ray.available_resources().get("CPU", 0) < total:
        time.sleep(0.05)
