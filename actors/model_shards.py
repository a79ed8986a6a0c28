"""Models that no node holds whole, asked all the same: their layers in the processes of shards, and who asks in one beside them."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayTaskError

from actors.memory import with_memory
from actors.names import actor_name, layers_in_words
from actors.placement import cluster_cpus, require, runs
from actors.transport import Container, find_transport, packed_positions, unpacked_positions
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.errors import ClusterError, PuzzleError


class ShardProcess:
    """Layers `first .. last` of whichever model is asked for. Every call brings what it needs, so a new process goes on where one died."""

    def __init__(self, first: int, last: int, num_threads: int, transport: str, num_gpus: float = 0) -> None:
        self.words = layers_in_words(range(first, last))  # first: Ray asks for them after a constructor that raised, too
        from puzzle_ray.models.shards import ModelShard
        from puzzle_ray.process import compute_with, device_for

        compute_with(num_threads)
        self.shard = ModelShard(range(first, last), device_for(num_gpus))
        self.transport = find_transport(transport)

    def __repr__(self) -> str:
        return f"ModelShard({self.words})"

    def node(self) -> str:
        """The id of the node this runs on."""
        return ray.get_runtime_context().get_node_id()

    def pid(self) -> int:
        return os.getpid()

    def load(self, folder: str, dtype: str) -> None:
        """Reads its layers of a folder's model, if they are not there."""
        import torch

        self.shard.load(folder, getattr(torch, dtype))

    def run(self, folder: str, dtype: str, entering: Container, position_ids: Container | None) -> Container:
        """Hidden states through these layers, in the model's dtype as they came."""
        import torch

        own = getattr(torch, dtype)
        known = unpacked_positions(position_ids, self.shard.device)
        leaving = self.shard.run(folder, own, self.transport.unpack(entering, own), known)
        packed: Container = self.transport.pack(leaving, own)
        return packed


@ray.remote(max_restarts=-1, max_task_retries=-1)  # every call brings what it needs, so any retry is safe
class ModelShardActor(ShardProcess):
    """A shard as an actor."""


@dataclass(frozen=True)
class Shards:
    """Running shards of all layers, as whoever asks a model is given them. A call waits for one shard at most `timeout_s`."""

    actors: Sequence[ActorHandle[Any]]
    transport: str
    timeout_s: float
    stage: str

    @property
    def num_shards(self) -> int:
        return len(self.actors)

    def layers_of(self, folder: str, dtype: Any, num_layers: int) -> LayersInActors:
        """A `puzzle_ray.models.shards.LayersOf`. All shards begin to read at once."""
        return LayersInActors(self, folder, dtype)


@dataclass(frozen=True)
class OneAfterTheOther:
    """Shards where one process alone has a GPU: whoever asks reads one after the other itself, every time it asks."""

    num_shards: int
    num_gpus: float

    def layers_of(self, folder: str, dtype: Any, num_layers: int) -> Any:
        """A `puzzle_ray.models.shards.LayersOf`."""
        from puzzle_ray.models.shards import in_this_process
        from puzzle_ray.process import device_for

        return in_this_process(self.num_shards, device_for(self.num_gpus))(folder, dtype, num_layers)


class LayersInActors:
    """All layers of one model, see `puzzle_ray.models.shards.Layers`. As many batches are on their way as keep every shard at work."""

    def __init__(self, shards: Shards, folder: str, dtype: Any) -> None:
        self.shards, self.folder, self.dtype = shards, folder, dtype
        self.transport = find_transport(shards.transport)
        self.reading = [shard.load.remote(folder, self._dtype_name) for shard in shards.actors]

    @property
    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def run(self, entering: Iterable[tuple[Any, Any]]) -> Iterator[Any]:
        while self.reading:
            self._wait(self.reading.pop(0), "read its layers")
        on_their_way: deque[ObjectRef[Container]] = deque()
        for hidden, position_ids in entering:
            on_their_way.append(self._send(hidden, position_ids))
            if len(on_their_way) >= 2 * len(self.shards.actors):
                yield self._arrived(on_their_way.popleft())
        while on_their_way:
            yield self._arrived(on_their_way.popleft())

    def _send(self, hidden: Any, position_ids: Any) -> ObjectRef[Container]:
        out: Any = ray.put(self.transport.pack(hidden, self.dtype))
        known = None if position_ids is None else ray.put(packed_positions(position_ids.cpu()))
        for shard in self.shards.actors:
            out = shard.run.remote(self.folder, self._dtype_name, out, known)
        leaving: ObjectRef[Container] = out
        return leaving

    def _arrived(self, ref: ObjectRef[Container]) -> Any:
        return self.transport.unpack(self._wait(ref, "handed hidden states on"), self.dtype)

    def _wait(self, ref: ObjectRef[Any], what: str) -> Any:
        """Raises ClusterError where a shard is silent for too long, and what a shard raised."""
        try:
            return ray.get(ref, timeout=self.shards.timeout_s)
        except GetTimeoutError:
            problem = f"a shard of {self.folder} has not {what} within {self.shards.timeout_s:g} s"
            remedy = "raise cluster.step_timeout_s; where shards die for want of memory, raise evaluate.num_shards"
            raise ClusterError(self.shards.stage, problem, remedy) from None
        except RayTaskError as error:
            if isinstance(error.cause, PuzzleError):
                raise error.cause from None
            raise


@dataclass(frozen=True)
class Placement:
    """How shards and the process that asks them are started: Ray options of each, and the layers of every shard."""

    layers: Sequence[range]
    shard: Mapping[str, Any]
    asking: Mapping[str, Any]
    cluster: ClusterConfig
    stage: str
    alone: bool = False  # no shard is a process of its own

    @property
    def num_gpus(self) -> float:
        """The share of whoever asks, too."""
        return self.cluster.gpus_per_shard

    def start(self, asking: Callable[[Mapping[str, Any]], ActorHandle[Any]]) -> Started:
        """Asks Ray for all of them. `asking` starts the process that asks, by its options."""
        cluster, shards = self.cluster, []
        if self.alone:
            return Started(asking(self.asking), OneAfterTheOther(len(self.layers), self.num_gpus))
        for own in self.layers:
            named = ModelShardActor.options(**self.shard, **actor_name(f"{self.stage} shard, {layers_in_words(own)}"))  # type: ignore[attr-defined]
            shards.append(named.remote(own.start, own.stop, 1, cluster.transport, cluster.gpus_per_shard))
        found = Shards(shards, cluster.transport, cluster.step_timeout_s, self.stage)
        return Started(asking(self.asking), found)


@dataclass(frozen=True)
class Started:
    """A process that asks, and the shards that it asks."""

    worker: ActorHandle[Any]
    shards: Shards | OneAfterTheOther | None = None  # None: it holds whole models itself

    @property
    def actors(self) -> list[ActorHandle[Any]]:
        return [self.worker, *(self.shards.actors if isinstance(self.shards, Shards) else ())]


def placed(folders: Iterable[str], cluster: ClusterConfig, num_shards: int, stage: str, dtype: str | None = None) -> Placement:
    """Shards for models in `dtype`, by default each in its own, of which each is asked about in turn.

    On GPUs every process has the share of a parent's shard, and there are as many shards as find one, up to `num_shards`: where shards end
    changes no bit. Where one process alone finds one, it reads the shards one after the other. On CPUs they ask Ray for the memory of their
    layers. Raises ClusterError.
    """
    depth, held, at_the_ends = _sizes(folders, dtype)
    gpus, count = cluster.gpus_per_shard, min(num_shards, depth)
    if gpus:
        room = require({"num_gpus": gpus}, "a shard", stage, cluster.autoscaling)
        if room == 1 and not cluster.autoscaling:
            words = f"one process finds {gpus:g} GPU: it reads {count} shards one after the other, for every token that it generates, too"
            print(f"  {stage}: {words}", file=sys.stderr, flush=True)
            only = {"num_cpus": 1, "num_gpus": gpus}
            return Placement(runs(depth, count), only, only, cluster, stage, alone=True)
        fewer = min(count, room - 1) if room > 1 else count
        if fewer < count:
            print(f"  {stage}: {fewer} shards in place of {count}: so many find a GPU", file=sys.stderr, flush=True)
        count = fewer
    share = 1 / -(-(count + 1) // cluster_cpus())  # more processes than cores share them
    options: dict[str, Any] = {"num_cpus": share, "num_gpus": gpus}
    shard, asking = options, options
    if not gpus:  # else the weights are in a GPU's memory
        shard = with_memory(options, max(held(own) for own in runs(depth, count)), "a shard", stage, count)
        asking = with_memory(options, at_the_ends, "the process that asks them", stage)
        together = count * shard.get("memory", 0) + asking.get("memory", 0)
        if together > ray.available_resources().get("memory", 0):
            asking = options
    return Placement(runs(depth, count), shard, asking, cluster, stage)


def _sizes(folders: Iterable[str], dtype: str | None) -> tuple[int, Callable[[range], int], int]:
    """How many layers the models have, the bytes of a shard's weights, and those at the ends of the largest model."""
    import torch

    from puzzle_ray.models.blocks import stack_without_weights
    from puzzle_ray.models.checkpoint import locate
    from puzzle_ray.models.child import read_config
    from puzzle_ray.models.describe import describe
    from puzzle_ray.models.shards import own_dtype
    from puzzle_ray.profiling.memory import weights_of

    per_layer: list[list[int]] = []
    ends = []
    for folder in map(locate, folders):
        config = read_config(folder)
        own = getattr(torch, dtype) if dtype else own_dtype(folder, config)
        stack, _ = stack_without_weights(describe(config), config, 0, config.num_hidden_layers, own)
        per_layer.append([weights_of(layer.parameters()).weight_bytes for layer in stack.layers])
        ends.append(weights_of(stack.parameters()).weight_bytes - sum(per_layer[-1]))
    depths = {len(layers) for layers in per_layer}
    assert len(depths) == 1, f"a child has as many layers as its parent, and these have {sorted(depths)}"
    return depths.pop(), lambda layers: max(sum(each[n] for n in layers) for each in per_layer), max(ends)
