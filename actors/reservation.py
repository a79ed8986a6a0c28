"""Where the library stage runs: the layers of each shard and its trainers, a node for them, and whether that node's store is big enough."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util import placement_group_table
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.data_plane import MIB, Flow
from actors.placement import (
    ROUNDING,
    all_nodes,
    await_free_cpus,
    fit,
    in_words,
    nodes,
    nodes_in_words,
    not_placed,
    require,
    runs,
    trainer_options,
)
from puzzle_ray.artifacts import SearchSpace
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.errors import ClusterError

Part = tuple[int, int]  # number, of how many
WHOLE: Part = (0, 1)
SPILLS_AT = 0.8  # of a store: Ray's default of when it begins to move objects to disk


def say(text: str) -> None:
    print(f"  library: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class ShardPlan:
    """The layers a shard runs, and those of each of its trainers (none where all its layers are finished).

    `splits` has for each trainer the number of its part of the variants, and how many parts there are; it is empty where all have all.
    """

    layers: range
    groups: tuple[tuple[int, ...], ...]
    colocated: bool = False
    splits: tuple[Part, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """Of each trainer."""
        return self.splits or (WHOLE,) * len(self.groups)

    @property
    def states(self) -> set[int]:
        """The hidden states that are in an object store for it: all that its layers read and write, or those at its ends alone."""
        ends = {self.layers.start, self.layers.stop}
        return ends if self.colocated else {*self.layers, *ends}


def plan_shards(layers: Sequence[int], cluster: ClusterConfig, space: SearchSpace | None = None) -> list[ShardPlan]:
    """Cuts layers 0 to the last of `layers`, which are to be trained, into shards, and each shard's into trainers.

    With `blocks_per_trainer: auto` there is a trainer for every place the nodes have, up to `trainers_per_layer` for each; where even
    one for each shard is too many, there are fewer shards, which is said. A layer has no more trainers than `space` has variants for it.
    """
    wanted = num_shards = min(cluster.num_shards, max(layers) + 1)
    auto = cluster.blocks_per_trainer == "auto" or cluster.colocate
    if cluster.gpus_per_shard:
        require({"num_gpus": cluster.gpus_per_shard}, "a parent shard", "library", cluster.autoscaling)
    places = require(trainer_options(cluster), "a block trainer", "library", cluster.autoscaling)
    while auto and not cluster.autoscaling and num_shards > 1 and _room_beside(num_shards, places, cluster) < num_shards:
        num_shards -= 1
    room = _room_beside(num_shards, places, cluster) if places else len(layers)
    if auto and cluster.autoscaling:
        room = max(room, num_shards)
    if num_shards < wanted:
        say(f"{num_shards} shards in place of {wanted}: the cluster holds no trainer for each of more")
    shards = runs(max(layers) + 1, num_shards)
    own = [[layer for layer in layers if layer in shard] for shard in shards]
    if cluster.colocate:
        counts = [min(1, len(part)) for part in own]
    else:
        each = 1 if auto else int(cluster.blocks_per_trainer)
        most = {layer: _most_trainers(layer, cluster, space) for layer in layers}
        counts = [sum(most[layer] for layer in part) if each == 1 else -(-len(part) // each) for part in own]
    while auto and sum(counts) > max(room, num_shards):
        several = [n for n, count in enumerate(counts) if count > 1]
        counts[min(several, key=lambda n: len(own[n]) / (counts[n] - 1))] -= 1
    if sum(counts) > room and not cluster.autoscaling:
        asked = f"{cluster.cpus_per_trainer} CPUs" + (
            f" and {cluster.gpus_per_trainer:g} GPUs" if cluster.gpus_per_trainer else ""
        )
        beside = f" beside {num_shards} shards of {cluster.gpus_per_shard:g}" if cluster.gpus_per_shard else ""
        problem = f"{sum(counts)} trainers of {asked}, and the cluster holds {room}{beside}: it has {nodes_in_words()}"
        remedy = "ask for smaller shares of a GPU" if auto else "raise it, lower cluster.num_shards, or leave it at auto"
        raise ClusterError("cluster.blocks_per_trainer", problem, remedy)
    return [_plan(shard, part, count, cluster, space) for shard, part, count in zip(shards, own, counts, strict=True)]


def _most_trainers(layer: int, cluster: ClusterConfig, space: SearchSpace | None) -> int:
    """That a layer's variants are split over at the most."""
    return min(cluster.trainers_per_layer, len(space.layers[layer].trained)) if space else cluster.trainers_per_layer


def _plan(shard: range, layers: Sequence[int], count: int, cluster: ClusterConfig, space: SearchSpace | None) -> ShardPlan:
    """Divides a shard's `layers` that are to be trained among `count` trainers: whole layers, or where there are more trainers, parts."""
    if count <= len(layers):
        groups = tuple(tuple(layers[i] for i in run) for run in runs(len(layers), count)) if layers else ()
        return ShardPlan(shard, groups, cluster.colocate)
    shares = dict.fromkeys(layers, 1)
    for _ in range(count - len(layers)):
        more = [layer for layer in layers if shares[layer] < _most_trainers(layer, cluster, space)]
        shares[max(more, key=lambda n: (len(space.layers[n].trained) if space else 1) / shares[n])] += 1
    parts = [(layer, (number, share)) for layer, share in shares.items() for number in range(share)]
    return ShardPlan(shard, tuple((layer,) for layer, _ in parts), splits=tuple(part for _, part in parts))


def _room_beside(num_shards: int, places: int, cluster: ClusterConfig) -> int:
    """How many of the `places` for trainers are left when shards have taken their GPUs."""
    if not cluster.gpus_per_trainer:
        return places
    gpus = sum(node["Resources"].get("GPU", 0.0) for node in nodes())
    left = (gpus - num_shards * cluster.gpus_per_shard) / cluster.gpus_per_trainer
    return max(0, min(places, int(left + ROUNDING)))


@dataclass
class Reservation:
    """A placement group: for each shard the bundle it runs in, and those of its trainers."""

    group: PlacementGroup
    shards: list[int]
    trainers: list[list[int]]

    @classmethod
    def make(cls, plans: Sequence[ShardPlan], cluster: ClusterConfig) -> Reservation:
        """Waits until the cluster has set the room aside. Raises ClusterError when it has not within `placement_timeout_s`.

        A bundle is on one node by definition: each shard and its trainers share one. Where no node is big enough for that a
        trainer is a bundle, packed as closely as there is room, and this is said. So it is where nodes are added on demand: how big
        those will be nobody knows here, but one that is there for a worker can hold that worker.
        """
        together, apart, sizes = _bundles(plans, cluster)
        if fit(together, nodes()):
            bundles, strategy = together, "SPREAD"
            sizes = [1] * len(together)
        elif not fit(apart, nodes()) and not cluster.autoscaling:
            asked = " and ".join(f"{{{in_words(bundle)}}}" for bundle in apart)
            problem = f"{asked}, each on one node, do not fit the cluster's {nodes_in_words()}"
            raise ClusterError("cluster", problem, "lower cluster.gpus_per_shard or cluster.gpus_per_trainer, or add nodes")
        else:
            most = max(together, key=lambda bundle: sorted(bundle.items()))
            if fit(apart, nodes()):
                say(
                    f"no room for a shard's trainers ({in_words(most)}) on one node each: hidden states cross the network; raise num_shards"
                )
            else:
                say(
                    f"asks for nodes for {len(apart)} workers, the largest of {in_words(max(apart, key=lambda b: sorted(b.items())))}"
                )
            bundles, strategy = apart, "PACK"
        group = placement_group(bundles, strategy)
        try:
            if not group.wait(cluster.placement_timeout_s):
                wanted = " and ".join(in_words(bundle) for bundle in bundles)
                raise not_placed(f"{len(plans)} shards with trainers of {{{wanted}}}", cluster.placement_timeout_s)
        except BaseException:
            remove_placement_group(group)
            raise
        shards: list[int] = []
        trainers: list[list[int]] = []
        first = 0
        left = iter(sizes)
        for plan in plans:
            shards.append(first)  # a shard that trains nothing runs beside the next one that does
            trainers.append([])
            if plan.groups:
                size = next(left)
                trainers[-1] = [first + n % size for n in range(len(plan.groups))]
                first += size
        return cls(group, shards, trainers)

    def options(self, bundle: int) -> dict[str, Any]:
        """Ray options of an actor in a bundle."""
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle)}

    def shards_of_nodes(self) -> dict[str, set[int]]:
        """Node id -> the shards whose hidden states are there. A bundle that is being placed anew has no node."""
        node_of = placement_group_table(self.group)["bundles_to_node_id"]
        found: dict[str, set[int]] = {}
        for number, (shard, trainers) in enumerate(zip(self.shards, self.trainers, strict=True)):
            for bundle in {shard, *trainers}:
                if node_of.get(bundle):
                    found.setdefault(node_of[bundle], set()).add(number)
        return found

    def release(self, actors: Sequence[Any]) -> None:
        """Ends the actors, and what was reserved for them is free again."""
        remove_placement_group(self.group)
        for actor in actors:
            ray.kill(actor, no_restart=True)
        await_free_cpus()


def room_elsewhere(layers: Sequence[int], cluster: ClusterConfig, space: SearchSpace) -> bool:
    """Whether the nodes that stay could hold the workers for these layers, or nodes for them would come."""
    try:
        return cluster.autoscaling or fit(_bundles(plan_shards(layers, cluster, space), cluster)[1], nodes())
    except ClusterError:  # there is no place for them
        return False


def _bundles(
    plans: Sequence[ShardPlan], cluster: ClusterConfig
) -> tuple[list[dict[str, float]], list[dict[str, float]], list[int]]:
    """What is reserved: a bundle for each shard that trains something, with its trainers; or one for every trainer, the shard's GPUs with
    its first. And how many trainers each has. A shard that trains nothing runs beside the next one that does, on GPUs of its own."""
    together, apart, sizes = [], [], []
    for_shards = 0.0
    for plan in plans:
        for_shards += cluster.gpus_per_shard
        size = len(plan.groups)
        if size:
            each = {"CPU": float(cluster.cpus_per_trainer), "GPU": float(cluster.gpus_per_trainer)}
            own = [each | {"GPU": each["GPU"] + for_shards}, *[each] * (size - 1)]
            together.append(_without_zeros({name: sum(bundle[name] for bundle in own) for name in each}))
            apart += [_without_zeros(bundle) for bundle in own]
            sizes.append(size)
            for_shards = 0.0
    return together, apart, sizes


def _without_zeros(bundle: Mapping[str, float]) -> dict[str, float]:
    """Ray has no bundle with 0 of something, and counts in ten thousandths."""
    return {name: round(amount, 4) for name, amount in bundle.items() if amount}


def check_stores(flow: Flow, plans: Sequence[ShardPlan], shards_of_nodes: Mapping[str, set[int]]) -> int:
    """The most bytes in flight in one node's store. Raises ClusterError where a store cannot hold what flows through its node."""
    stores = {node["NodeID"]: node["Resources"].get("object_store_memory", 0.0) for node in all_nodes()}
    most = 0
    for node, shards in shards_of_nodes.items():
        if node not in stores:  # it died just now: what was there is placed anew
            continue
        states = {index for n in shards for index in plans[n].states}
        needed = flow.bound_bytes(len(states))
        most = max(most, needed)
        if needed > SPILLS_AT * stores[node]:
            problem = (
                f"{flow.window} micro-batches x {len(states)} hidden states x {flow.state_bytes / MIB:.3g} MiB = {needed / MIB:.1f} MiB "
                f"do not fit {SPILLS_AT:.0%} of an object store of {stores[node] / MIB:.0f} MiB"
            )
            remedy = (
                "lower library.window or library.micro_batch_tokens, set library.activation_dtype to bfloat16, or start Ray with "
                f"--object-store-memory {int(needed / SPILLS_AT) + 1}"
            )
            raise ClusterError("library", problem, remedy)
    return most
