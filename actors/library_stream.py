"""The library stage on Ray: shards stream hidden states through the object store, trainers learn from them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from actors.block_trainer import BlockTrainer
from actors.colocated_shard import ColocatedShard
from actors.data_plane import MIB, Flow
from actors.leaving import LeavingNodes
from actors.metrics import note
from actors.names import actor_name, layers_in_words, part_in_words
from actors.parent_shard import ParentShard, ShardUsage
from actors.placement import DIED, not_placed, trainer_options, wait_ready
from actors.reservation import Reservation, ShardPlan, check_stores, plan_shards, room_elsewhere, say
from actors.spill_watch import SpillWatch
from actors.transport import find_transport, packed_positions
from puzzle_ray.artifacts import SearchSpace
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.data.order import Tokens
from puzzle_ray.distill.library import Library, finish_library, unfinished_layers
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.distill.text import LibraryText
from puzzle_ray.errors import ClusterError, OutOfOrder
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import read_config
from puzzle_ray.progress import Bar, Progress
from puzzle_ray.store import Artifact

LOST = (*DIED, ObjectLostError, NodeDiedError, WorkerCrashedError)


class _Interrupted(Exception):
    """A trainer or a node died, or a micro-batch was missed: drain, then go on from what all trainers know."""


@dataclass
class Stream:
    """The actors of one library stage and the micro-batches in flight between them."""

    plans: list[ShardPlan]
    shards: list[ActorHandle[Any]]
    trainers: list[ActorHandle[Any]]
    reservation: Reservation
    flow: Flow
    cluster: ClusterConfig
    space: SearchSpace

    @property
    def layers(self) -> list[int]:
        """Those that are trained."""
        return sorted({layer for group in self.groups for layer in group})

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """Layers of each trainer; a layer has several where its variants are split."""
        return [group for plan in self.plans for group in plan.groups]

    def send(self, position: int, ids: Any, known: Mapping[str, Any]) -> list[ObjectRef[Any]]:
        """Lets one micro-batch flow; returns one reference per trainer. Hidden state i is the input of layer i.

        `known` goes along to everyone: `position_ids`, where attention does not cross documents.
        """
        hidden: list[ObjectRef[Any]] = []
        entering: Any = ids
        options = find_transport(self.cluster.transport).method_options
        for shard, plan in zip(self.shards, self.plans, strict=True):
            returns = len(plan.layers) + (not hidden)
            out = shard.forward.options(num_returns=returns, **options).remote(entering, **known)
            hidden += out if isinstance(out, list) else [out]
            entering = hidden[-1]
        pending = []
        for trainer, layers in zip(self.trainers, self.groups, strict=True):
            indices = sorted({i for layer in layers for i in (layer, layer + 1)})
            pending.append(trainer.step.remote(position, indices, *[hidden[i] for i in indices], **known))
        return pending

    def collect(self, pending: Sequence[ObjectRef[Any]]) -> float | None:
        """Waits for one micro-batch; returns the mean loss over trainers. Raises _Interrupted when a trainer has to catch up."""
        try:
            losses = [loss for loss in ray.get(list(pending), timeout=self.cluster.step_timeout_s) if loss is not None]
        except LOST as error:
            raise _Interrupted(str(error)) from error
        except GetTimeoutError:
            problem = f"a micro-batch was not done within {self.cluster.step_timeout_s:g} s"
            raise ClusterError("library", problem, "raise cluster.step_timeout_s, or lower library.micro_batch_tokens") from None
        except RayTaskError as error:
            if isinstance(error.cause, (OutOfOrder, *LOST)) or isinstance(error, OutOfOrder):
                raise _Interrupted(str(error)) from error
            raise
        return sum(losses) / len(losses) if losses else None

    def drain(self, in_flight: Sequence[Sequence[ObjectRef[Any]]]) -> None:
        """Until nothing in flight runs any more, whatever became of it; not for longer than the dead are waited for."""
        refs = [ref for pending in in_flight for ref in pending]
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=min(self.cluster.step_timeout_s, self.cluster.placement_timeout_s))

    def last(self) -> int:
        """The last position every trainer has done; waits for those that are being started again.

        Raises ClusterError when they are not back within `cluster.placement_timeout_s`.
        """
        deadline = time.monotonic() + self.cluster.placement_timeout_s
        while True:
            try:
                asked = [trainer.last.remote() for trainer in self.trainers]
                found = ray.get([*asked, *self.also_awaited()], timeout=max(0.1, deadline - time.monotonic()))
                return min(found[: len(asked)])
            except (*DIED, GetTimeoutError):
                if time.monotonic() > deadline:
                    raise not_placed("trainers that died", self.cluster.placement_timeout_s) from None
                time.sleep(0.2)

    def also_awaited(self) -> list[ObjectRef[Any]]:
        """Calls that are answered once all others that micro-batches need are back: none, calls of shards wait for them."""
        return []

    def save(self) -> None:
        """What the trainers know, before they are ended. Who is gone, or cannot save, goes on from what it saved last."""
        try:
            ray.get([trainer.save.remote() for trainer in self.trainers], timeout=self.cluster.step_timeout_s)
        except RayError as error:
            say(f"not all trainers were saved ({str(error).strip().splitlines()[-1]}); they go on from their last checkpoints")

    def usage(self) -> list[ShardUsage]:
        """Of every shard's process."""
        return ray.get([shard.usage.remote() for shard in self.shards], timeout=self.cluster.step_timeout_s)

    def release(self) -> None:
        self.reservation.release([*self.shards, *self.trainers])


class ColocatedStream(Stream):
    """The same where every shard trains its own layers: `trainers` are those shards that have some."""

    def also_awaited(self) -> list[ObjectRef[Any]]:
        """Of shards that train nothing, too: a call of one that is being started again fails at once."""
        return [shard.pid.remote() for shard in self.shards]

    def send(self, position: int, ids: Any, known: Mapping[str, Any]) -> list[ObjectRef[Any]]:
        entering: Any = ids
        pending = []
        options = find_transport(self.cluster.transport).method_options
        for shard in self.shards:
            call = shard.forward_and_train.options(num_returns=2, **options)
            entering, loss = call.remote(position, entering, **known)
            pending.append(loss)
        return pending


def open_stream(
    parent: str,
    layers: Sequence[int],
    space: SearchSpace,
    config: LibraryConfig,
    cluster: ClusterConfig,
    artifact: Artifact,
    masked: bool = False,
) -> Stream:
    """Starts the actors that train `layers`, and waits for them; whoever opens a stream releases it. `masked`: position ids go along.

    Raises ClusterError when they cannot be placed, or when a node's store cannot hold what flows through it.
    """
    plans = plan_shards(layers, cluster, space)
    flow = Flow.of(config, read_config(locate(parent)).hidden_size, len(plans), masked)
    reservation = Reservation.make(plans, cluster)
    shards: list[ActorHandle[Any]] = []
    trainers: list[ActorHandle[Any]] = []
    try:
        largest = check_stores(flow, plans, reservation.shards_of_nodes())
        say(
            f"at most {largest / MIB:.1f} MiB in a node's object store, {flow.window} micro-batches of {flow.tokens} tokens in flight"
        )
        trains = (cluster.cpus_per_trainer, cluster.transport, cluster.gpus_per_trainer)
        for plan, bundle, bundles in zip(plans, reservation.shards, reservation.trainers, strict=True):
            how = (config.parent_dtype, config.activation_dtype, 1, cluster.transport, cluster.gpus_per_shard)
            shard_of = (parent, plan.layers.start, plan.layers.stop, *how)
            of_groups = [(parent, group, space, config, artifact, *trains) for group in plan.groups]
            named = actor_name(f"parent shard, {layers_in_words(plan.layers)}")
            if cluster.colocate:
                placed = named | reservation.options(bundles[0] if bundles else bundle) | shard_options(cluster, bool(bundles))
                both = ColocatedShard.options(**placed)  # type: ignore[attr-defined]
                shards.append(both.remote(shard_of, of_groups[0] if of_groups else None, plan is plans[-1]))
                trainers += shards[-1:] if of_groups else []
                continue
            options = {"num_cpus": 0, "num_gpus": cluster.gpus_per_shard}
            shard = ParentShard.options(**options, **named, **reservation.options(bundle))  # type: ignore[attr-defined]
            shards.append(shard.remote(*shard_of))
            for group, part, own, arguments in zip(plan.groups, plan.parts, bundles, of_groups, strict=True):
                named = actor_name(f"block trainer, {part_in_words(group, part)}") | reservation.options(own)
                trainer = BlockTrainer.options(**trainer_options(cluster), **named)  # type: ignore[attr-defined]
                trainers.append(trainer.remote(*arguments, part))
        wait_ready([*shards, *trainers], "parent shards and block trainers", cluster.placement_timeout_s)
    except BaseException:
        reservation.release([*shards, *trainers])
        raise
    kind = ColocatedStream if cluster.colocate else Stream
    return kind(plans, shards, trainers, reservation, flow, cluster, space)


def shard_options(cluster: ClusterConfig, trains: bool) -> dict[str, Any]:
    """What a shard with its trainers asks for: what those ask for, and its own share of a GPU."""
    own = trainer_options(cluster) if trains else {"num_cpus": 0}
    return own | {"num_gpus": own.get("num_gpus", 0) + cluster.gpus_per_shard}


def flow(
    stream: Stream, positions: range, text: LibraryText, window: int, bar: Bar, stop: Callable[[], bool] = lambda: False
) -> bool:
    """These positions, at most `window` of them in flight; none is when it returns. False where `stop` came first."""
    in_flight: deque[list[ObjectRef[Any]]] = deque()
    left = False
    check_stores(stream.flow, stream.plans, stream.reservation.shards_of_nodes())

    def await_oldest() -> None:
        loss = stream.collect(in_flight[0])
        in_flight.popleft()
        bar.advance(1, **({} if loss is None else {"loss": loss}))

    try:
        for position in positions:
            if stop():
                left = True
                break
            while len(in_flight) >= window:
                await_oldest()
            ids = text.batch(position)
            in_flight.append(stream.send(position, ids.numpy(), _known(text, ids)))
            note("queue_depth", len(in_flight), stage="library")
        while in_flight:
            await_oldest()
    except _Interrupted:
        stream.drain(in_flight)
        raise
    return not left


def _known(text: LibraryText, ids: Any) -> dict[str, Any]:
    """What every shard and trainer is told of a micro-batch beside hidden states; put once for all of them."""
    position_ids = packed_positions(text.position_ids(ids))
    return {} if position_ids is None else {"position_ids": ray.put(position_ids)}


def build_library(
    parent: str,
    space: SearchSpace,
    config: LibraryConfig,
    cluster: ClusterConfig,
    tokens: Tokens,
    seed: int,
    artifact: Artifact,
    progress: Progress,
) -> Library:
    """Trains every variant that is not in the step yet. Survives the death of any shard or trainer, and moves from a node that leaves.

    Raises ClusterError when the actors cannot be placed, or when more of them die than `cluster.max_recoveries`.
    """
    config = config.for_parent(read_config(locate(parent)))
    layers = unfinished_layers(space, artifact)
    if layers:
        text = LibraryText.of(tokens, seed, config)
        text.say_epochs()
        masked = tokens.separator is not None
        stream = open_stream(parent, layers, space, config, cluster, artifact, masked)
        try:
            with progress.stage("library", text.schedule.positions, "micro-batch") as bar:
                counting = _Counting(bar)
                while not _followed(stream, text, stream.flow.window, counting):
                    stream.save()
                    stream.release()
                    layers = unfinished_layers(space, artifact)
                    stream = open_stream(parent, layers, space, config, cluster, artifact, masked)
            _say_usage(stream)
        finally:
            stream.release()
    return finish_library(space, artifact)


def _say_usage(stream: Stream) -> None:
    try:
        usages = stream.usage()
    except RayError as error:  # the library is there all the same
        say(f"the shards did not tell what memory they took ({type(error).__name__})")
        return
    for number, (plan, usage) in enumerate(zip(stream.plans, usages, strict=True)):
        say(
            f"shard {number}, layers {plan.layers.start} to {plan.layers.stop - 1}: {usage.weights_bytes / MIB:.1f} MiB of weights, "
            f"peak memory {usage.peak_rss_bytes / MIB:.0f} MiB"
            + (f", {usage.peak_gpu_bytes / MIB:.0f} MiB on its GPU" if usage.peak_gpu_bytes else "")
        )


def _followed(stream: Stream, text: LibraryText, window: int, bar: _Counting) -> bool:
    """False where a node leaves, and there is room elsewhere."""
    with SpillWatch(stream.reservation.shards_of_nodes), _leaving(stream) as leaving:
        return _run(stream, text, window, bar, leaving.found.is_set)


def _leaving(stream: Stream) -> LeavingNodes:
    """Watches for nodes that leave, as long as the stream is open; one from which there is no way to go is said."""

    def move(node_id: str) -> bool:
        away = room_elsewhere(stream.layers, stream.cluster, stream.space)
        then = "shards and trainers move" if away else "no other node has room, so it is worked on until it is gone"
        say(f"node {node_id[:8]} is being drained: {then}")
        return away

    return LeavingNodes(stream.reservation.shards_of_nodes, move)


def _run(stream: Stream, text: LibraryText, window: int, bar: _Counting, stop: Callable[[], bool] = lambda: False) -> bool:
    """To the last position, from what all trainers know after every death; deaths are counted from the last progress that was saved.

    False where `stop` came first: then nothing is in flight, and the trainers may be ended and go on elsewhere.
    """
    failures = furthest = 0
    while True:
        start = stream.last() + 1
        if start > furthest:
            failures, furthest = 0, start
        bar.at(start)
        try:
            return flow(stream, range(start, text.schedule.positions), text, window, bar, stop)
        except _Interrupted as error:
            failures += 1
            reason = str(error).strip().splitlines()[0]
            if failures > stream.cluster.max_recoveries:
                problem = f"trainers died {failures} times without progress; the last time: {reason}"
                raise ClusterError("library", problem, "see the workers' logs in Ray's session folder") from error


class _Counting:
    """A bar that remembers how far it is, so that a step back is shown as one."""

    def __init__(self, bar: Bar) -> None:
        self.bar, self.done = bar, 0

    def at(self, position: int) -> None:
        """So many are done, whatever was shown before."""
        self.bar.advance(position - self.done)
        self.done = position

    def advance(self, count: int = 1, **facts: float) -> None:
        self.done += count
        self.bar.advance(count, **facts)
