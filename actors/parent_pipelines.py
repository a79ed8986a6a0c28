"""Whole parents, each cut into shards: as many as the cluster has room for, by the bytes that a shard holds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ray.actor import ActorHandle

from actors.memory import GIB, largest_node_bytes, with_memory
from actors.names import actor_name, layers_in_words
from actors.parent_shard import ParentShard
from actors.placement import cluster_cpus, places, require, runs
from actors.pool import Pool, Terms
from puzzle_ray.cluster import ClusterConfig

Handle = TypeVar("Handle")


@dataclass
class ParentPipelines(Generic[Handle]):
    """Pipelines of shards, started when the first work is met.

    `held_bytes` says what a shard with some layers holds; `handle_of` makes a pool's handle of the shards of one parent.
    """

    parent: str
    num_layers: int
    cluster: ClusterConfig
    stage: str
    limit: int  # of pipelines
    held_bytes: Callable[[range], int]
    handle_of: Callable[[list[ActorHandle[Any]], list[range]], Handle]
    dtype: str = "float32"
    tf32: bool = False
    started: Pool[Handle, Any] | None = field(default=None, init=False)
    layers: list[range] = field(default_factory=list, init=False)
    room: int = field(default=1, init=False)  # for how many pipelines

    def pool(self) -> Pool[Handle, Any]:
        """The pipelines, started by the first who asks, and more of them where the limit has risen since.

        Each has enough work on its way that no shard waits for some.
        """
        if self.started is None:
            room, cluster = cluster_cpus(), self.cluster
            num_shards = cluster.num_shards
            if cluster.gpus_per_shard:
                wanted = {"num_gpus": cluster.gpus_per_shard}
                gpus = require(wanted, "a parent shard", self.stage, cluster.autoscaling) or num_shards
                num_shards, room = min(num_shards, gpus), min(room, gpus)
            else:
                num_shards = self._enough_shards(num_shards)
            self.layers = runs(self.num_layers, num_shards)
            share = 1 / -(-len(self.layers) // cluster_cpus())  # more shards than cores share them; whole shares of every core
            options: dict[str, Any] = {"num_cpus": share, "num_gpus": cluster.gpus_per_shard}
            if not cluster.gpus_per_shard:  # else the weights are in a GPU's memory
                held = max(self.held_bytes(own) for own in self.layers)
                options = with_memory(options, held, "a parent shard", self.stage, len(self.layers))
                room = min(room, places({"memory": options["memory"]})) if "memory" in options else room
            terms = Terms(self.stage, "parent shards", cluster.placement_timeout_s, cluster.step_timeout_s)
            depth = 2 * len(self.layers)
            self.started = Pool(lambda: self._start_one(options), terms, depth=depth, restarts=True)
            self.room = max(1, room // len(self.layers))
        self.started.start(max(0, min(self.limit, self.room) - len(self.started.workers)))
        return self.started

    def _enough_shards(self, asked: int) -> int:
        """More than were asked for, where a shard would not fit the largest node. Where shards end changes no bit."""
        largest, count = largest_node_bytes(), min(asked, self.num_layers)
        while largest and count < self.num_layers and max(map(self.held_bytes, runs(self.num_layers, count))) > largest:
            count += 1
        if count > asked:
            words = f"{count} shards in place of {asked}: the largest node has {largest / GIB:.2f} GiB"
            print(f"  {self.stage}: {words}", file=sys.stderr, flush=True)
        return count

    def _start_one(self, options: dict[str, Any]) -> tuple[Handle, Sequence[ActorHandle[Any]]]:
        cluster = self.cluster
        how = (self.dtype, self.dtype, 1, cluster.transport, cluster.gpus_per_shard, self.tf32)
        actor: Any = ParentShard
        shards = []
        for own in self.layers:
            named = actor.options(**options, **actor_name(f"{self.stage} shard, {layers_in_words(own)}"))
            shards.append(named.remote(self.parent, own.start, own.stop, *how))
        return self.handle_of(shards, self.layers), shards

    def close(self) -> None:
        if self.started is not None:
            self.started.close()
            self.started = None
