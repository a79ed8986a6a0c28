"""What the nodes have, what running stages hold of it, waiting for actors with a limit, and ending them."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError

from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.errors import ClusterError
from puzzle_ray.profiling.settings import ProfileConfig

DIED = (RayActorError, OutOfMemoryError)  # what the calls of an actor raise whose process is gone
LABEL = "[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
SELECTOR = re.compile(rf"(?:!?(?:in\({LABEL}(?:, ?{LABEL})*\)|{LABEL}))?")
ROUNDING = 1e-6  # Ray counts resources in ten thousandths
Node = Mapping[str, Any]  # as ray.nodes() describes it


@dataclass
class Claims:
    """Parts of nodes that a stage of this driver holds while it runs. Another stage that starts beside it plans with the rest."""

    held: dict[object, tuple[str, Mapping[str, float]]] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def add(self, owner: object, node_id: str, resources: Mapping[str, float]) -> None:
        """`owner` holds so much of a node until it is removed."""
        with self.lock:
            self.held[owner] = (node_id, dict(resources))

    def remove(self, owner: object) -> None:
        with self.lock:
            self.held.pop(owner, None)

    def left(self, node: Node) -> dict[str, float]:
        """What a node has, less what is held of it."""
        left = dict(node["Resources"])
        with self.lock:
            for node_id, resources in self.held.values():
                if node_id == node["NodeID"]:
                    left.update({name: max(0.0, left.get(name, 0.0) - amount) for name, amount in resources.items()})
        return left

    def total(self, name: str) -> float:
        """What is held of one resource on all nodes together."""
        with self.lock:
            return sum(resources.get(name, 0.0) for _, resources in self.held.values())


CLAIMS = Claims()
LEAVING: set[str] = set()  # ids of nodes that are there, and on which Ray puts nothing new


def all_nodes() -> list[Node]:
    """Live nodes with all they have."""
    return [node for node in ray.nodes() if node["Alive"]]


def nodes() -> list[Node]:
    """Live nodes that stay, with what the stages that run now leave of them."""
    return [{**node, "Resources": CLAIMS.left(node)} for node in all_nodes() if node["NodeID"] not in LEAVING]


def cluster_cpus() -> int:
    return max(1, int(sum(node["Resources"].get("CPU", 0) for node in nodes()) + ROUNDING))


def runs(num_items: int, num_groups: int) -> list[range]:
    """`num_items` in `num_groups` contiguous runs whose lengths differ by at most one."""
    num_groups = max(1, min(num_groups, num_items))
    edges = [num_items * i // num_groups for i in range(num_groups + 1)]
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def matching_nodes(
    resources: Mapping[str, float], labels: Mapping[str, str] | None = None, among: Sequence[Node] | None = None
) -> list[Node]:
    """Those of the nodes that have so much of every resource, and whose labels are those of a Ray label selector.

    Without `among`, the live nodes with what the stages that run now leave of them.
    """
    return [
        node
        for node in (nodes() if among is None else among)
        if all(node["Resources"].get(name, 0) + ROUNDING >= amount for name, amount in resources.items())
        and all(_selects(wanted, node.get("Labels", {}).get(name)) for name, wanted in (labels or {}).items())
    ]


def node_cpus(resources: Mapping[str, float] | None = None, label_selector: Mapping[str, str] | None = None) -> int:
    """CPUs, in use or not, of the biggest live node that has these resources and labels; 1 where there is none."""
    found = matching_nodes(resources or {}, label_selector, all_nodes())
    return max(1, int(max((node["Resources"].get("CPU", 0) for node in found), default=1)))


def _selects(wanted: str, value: str | None) -> bool:
    """Ray's label operators: `a`, `!a`, `in(a, b)`, `!in(a, b)`; a missing label matches the negative ones."""
    negative, text = wanted.startswith("!"), wanted.removeprefix("!")
    listed = re.fullmatch(r"in\((.*)\)", text)
    values = [word.strip() for word in listed.group(1).split(",")] if listed else [text]
    return (value in values) != negative


def places(options: Mapping[str, Any], among: Sequence[Node] | None = None) -> int:
    """How many actors with these Ray options the nodes can hold at once, were nothing running there but what is claimed."""
    resources = resources_of(options)
    found = matching_nodes(resources, options.get("label_selector"), among)
    return sum(min(int(node["Resources"][name] / amount + ROUNDING) for name, amount in resources.items()) for node in found)


def resources_of(options: Mapping[str, Any]) -> dict[str, float]:
    """What an actor with these options takes, by Ray's names; never nothing at all."""
    wanted = {
        "CPU": options.get("num_cpus", 0),
        "GPU": options.get("num_gpus", 0),
        "memory": options.get("memory", 0),
        **options.get("resources", {}),
    }
    return {name: float(amount) for name, amount in wanted.items() if amount} or {"memory": 1.0}


def require(options: Mapping[str, Any], what: str, where: str, autoscaling: bool) -> int:
    """How many actors with these options have room. Raises ClusterError at once where no node could ever hold a single one,
    or for a label selector that Ray does not know.
    """
    for name, wanted in options.get("label_selector", {}).items():
        if not SELECTOR.fullmatch(wanted):
            raise ClusterError(where, f"label_selector: {name}: {wanted!r} selects nothing", "write a, !a, in(a, b) or !in(a, b)")
    if not autoscaling and places(options, all_nodes()) == 0:
        asked = resources_of(options) | dict(options.get("label_selector", {}))
        problem = f"no node can hold {what} with {in_words(asked)}; the cluster has {nodes_in_words()}"
        raise ClusterError(
            where, problem, "ask for what there is, or set cluster.autoscaling where such nodes are added on demand"
        )
    return places(options)


def profiler_options(config: ProfileConfig) -> dict[str, Any]:
    """A profiler's Ray options. On CPUs it takes a whole node of the kind asked for, on GPUs its share of one."""
    threads = 1 if config.num_gpus else node_cpus(config.resources, config.label_selector)
    options: dict[str, Any] = {"num_cpus": threads, "num_gpus": config.num_gpus}
    if config.resources:
        options["resources"] = dict(config.resources)
    if config.label_selector:
        options["label_selector"] = dict(config.label_selector)
    return options


def trainer_options(cluster: ClusterConfig) -> dict[str, Any]:
    """A block trainer's Ray options."""
    return {"num_cpus": cluster.cpus_per_trainer, "num_gpus": cluster.gpus_per_trainer}


def room_beside_profile(profile: ProfileConfig, cluster: ClusterConfig) -> bool:
    """Whether the library stage has room for all its shards, each with a trainer, while profilers hold theirs, wherever Ray puts them.

    False where that is not certain: where nodes come and go, where the number of trainers is fixed (it may need the whole cluster), and
    where library and profile would have to share the CPUs of a node, which would spoil what is measured.
    """
    if cluster.autoscaling or cluster.blocks_per_trainer != "auto":
        return False
    live, options = all_nodes(), profiler_options(profile)
    count = min(profile.num_profilers, places(options, live))
    if not count:
        return False
    could_host = matching_nodes(resources_of(options), options.get("label_selector"), live)
    hosts = {node["NodeID"] for node in could_host}
    left = [node for node in live if node["NodeID"] not in hosts]
    if profile.num_gpus and cluster.gpus_per_trainer:  # each of them may get all profilers
        held = {name: count * amount for name, amount in resources_of(options).items()}
        left += [{**node, "Resources": _less(node["Resources"], held)} for node in could_host]
    elif not profile.num_gpus:  # each takes a whole one, in the worst case those that the library would like best
        could_host.sort(key=lambda node: (node["Resources"].get("GPU", 0.0), node["Resources"].get("CPU", 0.0)))
        left += could_host[: len(could_host) - count]
    wanted = {"CPU": float(cluster.cpus_per_trainer), "GPU": cluster.gpus_per_trainer + cluster.gpus_per_shard}
    return fit([wanted] * cluster.num_shards, left)


def _less(resources: Mapping[str, float], held: Mapping[str, float]) -> dict[str, float]:
    return {name: max(0.0, amount - held.get(name, 0.0)) for name, amount in resources.items()}


def fit(bundles: Sequence[Mapping[str, float]], among: Sequence[Node]) -> bool:
    """Whether these bundles of CPUs and GPUs all find a node with room, the biggest first, each where most is left."""
    free = [{name: float(node["Resources"].get(name, 0)) for name in ("GPU", "CPU")} for node in among]
    for bundle in sorted(bundles, key=lambda bundle: (bundle.get("GPU", 0.0), bundle["CPU"]), reverse=True):
        best = max(
            (node for node in free if all(node[name] + ROUNDING >= amount for name, amount in bundle.items())),
            key=lambda node: (node["GPU"], node["CPU"]),
            default=None,
        )
        if best is None:
            return False
        for name, amount in bundle.items():
            best[name] -= amount
    return True


def nodes_in_words() -> str:
    """Resources and labels of every live node, equal nodes counted: `2 x {CPU: 8, H100: 1, ray.io/accelerator-type: H100}`."""
    described: Counter[str] = Counter()
    for node in all_nodes():
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
        ray.get([actor.node.remote() for actor in actors], timeout=timeout_s)
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
    """Until all CPUs are free that no running stage claims, or until the time is up."""
    total = ray.cluster_resources().get("CPU", 0) - CLAIMS.total("CPU")
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and ray.available_resources().get("CPU", 0) + ROUNDING < total:
        time.sleep(0.05)
