"""Who measures, and who evaluates, by the hardware: as many GPUs of a node as hold a whole model, or shards of one that no node holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from puzzle_ray.config import RunConfig
from puzzle_ray.planning.draft import Draft, fitting
from puzzle_ray.planning.evaluating import evaluation_demand, evaluation_phases, sharded_demands
from puzzle_ray.planning.hardware import Seen, room_bytes
from puzzle_ray.planning.needs import Demand
from puzzle_ray.planning.sizes import Sizes
from puzzle_ray.profiling.nodes import GIB, Node
from puzzle_ray.profiling.scenarios import AUTO

SHARE_OF_A_NODE = 0.4  # of its memory that a shard on CPUs may take
_NOT_WHOLE = "no node's GPUs hold a whole model"
_ON_A_CPU = "no GPU holds a whole model, and nothing is measured on GPUs"


def decide_profile(draft: Draft, sizes: Sizes, gpus: Seen, bfloat16: bool) -> None:
    """As many GPUs of a node for whoever measures as a whole model takes: models are timed by who has as many GPUs as a profiler."""
    profile = draft.config.profile
    if profile.engine == "roofline":
        return
    draft.decide("profile.dtype", "bfloat16" if bfloat16 else "float32", "as GPUs serve")
    fits = _gpus_of_a_whole_model(draft, sizes, gpus)
    why = "a GPU is what is measured" if fits == 1 else f"a whole model is spread over {fits} GPUs of a node"
    count = math.ceil(draft.decide("profile.num_gpus", fits, why if fits else "no node's GPUs hold a whole model"))
    if count:
        draft.decide("profile.memory_mib", count * gpus.gpu_bytes >> 20, f"of {f'{count} x' if count > 1 else 'an'} {gpus.name}")
    if not fits and not draft.config.profile.num_gpus:
        size = evaluation_demand(_with_gpus(draft.config, gpus.per_node), sizes, gpus.gpu_bytes).total / GIB
        words = f"profile: a whole model takes {size:.1f} GiB, no node's GPUs hold it, and costs are measured on a CPU"
        draft.warnings.append(f"{words}; set profile.engine=roofline and profile.device for the target's")


def _gpus_of_a_whole_model(draft: Draft, sizes: Sizes, gpus: Seen) -> int:
    """So many of a node hold a whole model while it is evaluated; 0 where no node's do."""
    needed = ((n, evaluation_demand(_with_gpus(draft.config, n), sizes, gpus.gpu_bytes)) for n in range(1, gpus.per_node + 1))
    return next((n for n, demand in needed if demand.total <= room_bytes(gpus, n)), 0)


def _with_gpus(config: RunConfig, count: int) -> RunConfig:
    """For whoever measures. With `auto`, batches are as large as the memory that there is, whatever that is: the smallest is looked at."""
    plain = {"batch_sizes": ()} if config.profile.batch_sizes == AUTO else {}
    return config.model_copy(update={"profile": config.profile.model_copy(update={"num_gpus": count} | plain)})


def decide_evaluation(draft: Draft, sizes: Sizes, gpus: Seen) -> None:
    """Models that no node's GPUs hold are evaluated in as few shards as have room, with a GPU's share for each and for who asks them.

    So are those that no GPU holds, and that a CPU would read whole. Where a single process finds a GPU, it reads one shard after the other.
    """
    name, share, depth = "evaluate.num_shards", draft.config.cluster.gpus_per_shard, len(sizes.layers)
    whole = _gpus_of_a_whole_model(draft, sizes, gpus)
    if not draft.open(name) or whole == 1 or (whole and draft.config.profile.num_gpus):
        return
    reason = _ON_A_CPU if whole else _NOT_WHOLE
    if not share:
        draft.decide(name, min(depth, draft.config.cluster.num_shards), f"{reason}, and shards compute on CPUs")
        return
    places = gpus.num_gpus * max(1, round(1 / share)) - 1
    together = places < 1  # who asks holds the shards, too

    def shards(config: RunConfig) -> list[Demand]:
        found = sharded_demands(config, sizes)
        each = [demand for demand in found if demand.process == "shard"]
        asking = [demand for demand in found if demand.process != "shard"]
        return [sharing(*pair) for pair in zip(each, asking, strict=True)] if together else each

    def sharing(shard: Demand, asking: Demand) -> Demand:
        return replace(asking, parts={**shard.parts, **asking.parts})

    most = depth if together else min(depth, places)
    found = next(fitting(draft, [(name, n) for n in range(1, most + 1)], shards, gpus), None)
    draft.put(name, 0)
    why = "the fewest that have room" if found else "as many as there are layers" if together else "as many as find a GPU"
    why += ", one after the other in the one process that finds a GPU" if together else ""
    draft.decide(name, found or most, f"{reason}; {why}, and no speed is measured")


def decide_evaluation_on_cpus(draft: Draft, sizes: Sizes, nodes: Sequence[Node]) -> None:
    """In shards where no node's memory holds what one worker would need, were models timed one after the other."""
    name, memory = "evaluate.num_shards", max((node.memory_bytes for node in nodes if node.memory_bytes), default=0)
    if not memory or not draft.open(name):
        return
    phases = evaluation_phases(_with_gpus(draft.config, 0), sizes, 0).values()
    if max(sum(parts.values()) - parts.get("two models", 0) // 2 for parts in phases) <= memory:
        return
    least = min(node.memory_bytes for node in nodes if node.memory_bytes)
    for count in range(1, len(sizes.layers) + 1):
        draft.put(name, count)
        shards = [demand for demand in sharded_demands(draft.config, sizes) if demand.process == "shard"]
        if all(demand.total <= SHARE_OF_A_NODE * least for demand in shards):
            break
    draft.put(name, 0)
    draft.decide(name, count, f"no node's {memory / GIB:.1f} GiB hold a whole model, and no speed is measured")
