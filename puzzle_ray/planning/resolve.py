"""`hardware: auto`: the settings that a cluster decides, for those that the config leaves open.

What a config says itself always holds. Everything else here is a pure function of the config, the parent's shape and the nodes:

- on GPUs: bfloat16 where they have it; each GPU holds a run of layers and their trainers in one process (`cluster.colocate`), micro-batches
  are the largest powers of two of sequences, up to a limit, that the plan (`puzzle_ray.planning.demand`) finds room for; every GPU is a
  worker of GKD; profiles are measured on one GPU;
- on CPUs: float32, and the defaults. There is a shard for every node, and more where a node's memory is too small for one;
- where no node holds a whole model, it is evaluated with its layers in shards (`evaluate.num_shards`), and its speed is not measured.

A later run in the same store is given what the first one decided of the settings in `IN_KEYS`, see `puzzle_ray.planning.settled`.

GKD: `gkd.step_tokens` is what one step is to have, whatever the cluster; workers, micro-batches and `gkd.gradient_accumulation` make
it. Where nobody says, a step is what the workers have room for, and the learning rate is found by a range test (`auto`). So it is with
the library: where a step of its variants is what a GPU has room for, each finds its learning rate by trials (`auto`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puzzle_ray.artifacts import SearchSpace
from puzzle_ray.config import RunConfig, validated
from puzzle_ray.distill.settings import AUTO
from puzzle_ray.planning.block_training import trainers_of_layers
from puzzle_ray.planning.demand import demands, library_demands, scores_demand
from puzzle_ray.planning.distilling import gkd_demand
from puzzle_ray.planning.draft import AS_SHARES, IN_KEYS, STEP, Draft, fitting, is_set, value_of
from puzzle_ray.planning.hardware import Seen, host_problems, problems
from puzzle_ray.planning.measuring import SHARE_OF_A_NODE, decide_evaluation, decide_evaluation_on_cpus, decide_profile
from puzzle_ray.planning.needs import Demand
from puzzle_ray.planning.sizes import Sizes
from puzzle_ray.profiling.nodes import GIB, Node, in_words

LARGEST_LIBRARY_TOKENS = 16_384  # of a micro-batch, which is a step of every variant; our choice: the paper says no batch
LARGEST_SCORING_TOKENS = 8_192  # more keep a GPU no busier
LARGEST_GKD_TOKENS = 16_384
BUSY_TOKENS = (
    4_096  # of a micro-batch, above which a GPU is well used: rather larger ones with layers run twice than smaller ones
)
CPU_TOKENS = 2_048  # the sections' own default


@dataclass(frozen=True)
class Resolved:
    """A config in which nothing is left to the hardware, and what to tell: decisions and warnings, one line each.

    `noted` are the values that stages' keys have, of what was decided here; not what the config says, and not of a GKD that there is not.
    """

    config: RunConfig
    lines: tuple[str, ...]
    warnings: tuple[str, ...]
    noted: Mapping[str, Any]


def resolve(
    config: RunConfig,
    model_config: Any,
    space: SearchSpace,
    nodes: Sequence[Node],
    kept: Mapping[str, Any] | None = None,
    kept_by: Mapping[str, str] | None = None,
) -> Resolved:
    """The config for these nodes. Raises ConfigError where what is set and what is found do not go together."""
    draft = Draft(config, _suiting(config, kept or {}), kept_by or {})
    gpus, sizes = Seen.of(nodes), Sizes(model_config, space)
    bfloat16 = all(node.gpus.bfloat16 for node in nodes if node.gpus is not None)
    if gpus is not None:
        _place_on_gpus(draft, sizes, gpus, nodes)
        _dtypes(draft, bfloat16)
        _micro_batches(draft, sizes, gpus)
        _distillation(draft, sizes, gpus)
        draft.leave(("gkd.gradient_accumulation", "gkd.learning_rate") if draft.config.gkd.use_gpu else ())
        decide_profile(draft, sizes, gpus, bfloat16)
        decide_evaluation(draft, sizes, gpus)
    else:
        _on_cpus(draft, sizes, nodes)
    for name in draft.kept:
        draft.decide(name, value_of(draft.config, name), "")
    _whole_sequences(draft)
    found = validated(draft.config.model_copy(update={"hardware": None}).model_dump(mode="json"))
    if gpus is not None:
        started = with_workers_that_start(found, gpus.num_gpus)
        draft.warnings += problems(demands(started, model_config, sizes, gpus.gpu_bytes), gpus)
        draft.warnings += idle(found, gpus.num_gpus)
    if all(node.memory_bytes for node in nodes):
        started = _with_trainers_that_start(found, sizes, nodes)
        draft.warnings += host_problems(demands(started, model_config, sizes, gpus.gpu_bytes if gpus else 0), nodes)
    noted = {name: value_of(found, name) for name in IN_KEYS if name in draft.decided and _is_used(draft, name, gpus)}
    return Resolved(found, (f"found {in_words(nodes)}", *draft.lines), tuple(draft.warnings), noted)


def _suiting(config: RunConfig, kept: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without what GKD's step was made of, where that, with what the config says, is no longer the step that it asks for.

    Nor with a learning rate that is found by held-out text where there is none.
    """
    step = config.gkd.step_tokens
    if not config.gkd.heldout_tokens:
        kept = {name: value for name, value in kept.items() if (name, value) != ("gkd.learning_rate", AUTO)}
    if step is None or config.gkd.stages:
        return kept
    made = [value_of(config, name) if is_set(config, name) else kept.get(name, 0) for name in STEP]  # 0: to be decided
    if math.prod(made) == step:
        return kept
    return {name: value for name, value in kept.items() if name not in (*STEP, "gkd.learning_rate")}


def _is_used(draft: Draft, name: str, gpus: Seen | None) -> bool:
    """Whether a stage of this run computes by it. What follows from GKD's being set to CPUs beside GPUs is no choice of the cluster."""
    gkd = draft.config.gkd
    if not name.startswith("gkd."):
        return True
    if not gkd.trains or (gpus is not None and not gkd.use_gpu and is_set(draft.original, "gkd.use_gpu")):
        return False
    return not gkd.stages or name != "gkd.micro_batch_tokens"


def _whole_sequences(draft: Draft) -> None:
    """For micro-batches that nobody has decided, on whichever device; those of a GKD that does not read them, without a word."""
    length = draft.config.data.sequence_length
    for name in ("library.micro_batch_tokens", "scoring.micro_batch_tokens", "gkd.micro_batch_tokens"):
        if not draft.open(name) or not value_of(draft.config, name) % length:
            continue
        whole = max(1, CPU_TOKENS // length) * length
        if name.startswith("gkd."):
            draft.put(name, whole)
        else:
            draft.decide(name, whole, f"whole sequences of {length}")


def with_workers_that_start(config: RunConfig, num_gpus: int) -> RunConfig:
    """With as many of GKD's workers as find a GPU, where `gkd.min_workers` lets fewer share the micro-batches."""
    gkd = config.gkd
    if not gkd.use_gpu or gkd.min_workers is None:
        return config
    workers = max(gkd.min_workers, min(gkd.num_workers, num_gpus))
    return config.model_copy(update={"gkd": gkd.model_copy(update={"num_workers": workers})})


def _with_trainers_that_start(config: RunConfig, sizes: Sizes, nodes: Sequence[Node]) -> RunConfig:
    """With as many layers for each block trainer as there are for every place that the nodes' CPUs have."""
    cluster, places = config.cluster, sum(node.cpus for node in nodes) // config.cluster.cpus_per_trainer
    if cluster.colocate or cluster.blocks_per_trainer != AUTO or cluster.trainers_per_layer > 1 or not places:
        return config
    each = -(-len(sizes.layers) // places)
    return config.model_copy(update={"cluster": cluster.model_copy(update={"blocks_per_trainer": each})})


def idle(config: RunConfig, num_gpus: float) -> list[str]:
    """A warning where a cluster has GPUs and stages compute on its CPUs."""
    cluster, names = config.cluster, {}
    names["the library"] = cluster.gpus_per_trainer, ["cluster.gpus_per_shard", "cluster.gpus_per_trainer"]
    names["scoring"] = cluster.gpus_per_shard, ["cluster.gpus_per_shard"]
    if config.gkd.trains:
        names["GKD"] = float(config.gkd.use_gpu), ["gkd.use_gpu"]
    still = {stage: settings for stage, (share, settings) in names.items() if not share}
    if not num_gpus or not still:
        return []
    settings = ", ".join(dict.fromkeys(name for own in still.values() for name in own))
    words = f"{num_gpus:g} GPUs are idle while {', '.join(still)} compute{'s' * (len(still) == 1)} on CPUs"
    return [f"{words}; set {settings}, or hardware: auto"]


# on GPUs


def _place_on_gpus(draft: Draft, sizes: Sizes, gpus: Seen, nodes: Sequence[Node]) -> None:
    """Which layers are together on a GPU; where the config or an earlier run has them on CPUs, they stay there."""
    depth = len(sizes.layers)
    given = [draft.fixed(name) for name in AS_SHARES]
    if all(share is not None and not share for share in given):
        for name in AS_SHARES:
            draft.decide(name, 0, "")
        draft.decide("cluster.num_shards", *_shards_on_cpus(draft, sizes, nodes))
        return
    cluster = draft.config.cluster
    apart = cluster.trainers_per_layer > 1 or cluster.blocks_per_trainer != AUTO  # trainers with processes of their own
    if not apart and not any(is_set(draft.original, name) for name in AS_SHARES):
        draft.decide("cluster.colocate", True, "hidden states stay on the GPU of their layers")
    each = -(-depth // gpus.num_gpus)
    shards = draft.decide(
        "cluster.num_shards", -(-depth // each), f"{depth} layers on {gpus.num_gpus} GPUs, {each} at most on each"
    )
    share, why = 0.5, "a shard and its trainers are one process, with one GPU"
    if not draft.config.cluster.colocate:
        layers = -(-depth // shards) * max(trainers_of_layers(draft.config, sizes))
        together = 1 if cluster.blocks_per_trainer == AUTO else int(cluster.blocks_per_trainer)
        share, why = 1 / (1 + -(-layers // together)), "a shard and its trainers share a GPU"
    for name in AS_SHARES:
        draft.decide(name, share, why)


def _dtypes(draft: Draft, bfloat16: bool) -> None:
    if not bfloat16:
        draft.warnings.append("not all GPUs have bfloat16: weights and activations stay in float32")
    cluster, why = draft.config.cluster, "GPUs have it" if bfloat16 else "not all GPUs have bfloat16"
    dtype = "bfloat16" if bfloat16 else "float32"
    if cluster.gpus_per_shard:
        for name in ("library.parent_dtype", "library.activation_dtype", "scoring.dtype"):
            draft.decide(name, dtype, why)
    if cluster.gpus_per_trainer:
        draft.decide("library.compute_dtype", dtype, why)


def powers(length: int, least: int, most: int) -> Iterator[int]:
    """Whole sequences of `length` tokens, doubled each time, from the most within `most` down to `least`; never less than one."""
    doubled = max(0, int(math.log2(max(1, most // length))))
    for n in range(doubled, -1, -1):
        if length << n >= least or not n:
            yield length << n


def _micro_batches(draft: Draft, sizes: Sizes, gpus: Seen) -> None:
    length, cluster = draft.config.data.sequence_length, draft.config.cluster

    def largest(name: str, most: int, needed: Callable[[RunConfig], Iterable[Demand]]) -> None:
        if draft.open(name):
            tokens = next(fitting(draft, [(name, n) for n in powers(length, 0, most)], needed, gpus), length)
            draft.decide(name, tokens, f"the most, of at most {most}, that has room")

    if cluster.gpus_per_trainer or cluster.gpus_per_shard:
        unknown = draft.open("library.micro_batch_tokens")
        largest("library.micro_batch_tokens", LARGEST_LIBRARY_TOKENS, lambda c: library_demands(c, sizes))
        if unknown:
            draft.decide("library.learning_rate", AUTO, "a step is what a GPU has room for, and no rate is known for it")
    draft.leave(("library.learning_rate",))
    if cluster.gpus_per_shard:
        largest("scoring.micro_batch_tokens", LARGEST_SCORING_TOKENS, lambda c: [scores_demand(c, sizes.config, sizes)])


def _distillation(draft: Draft, sizes: Sizes, gpus: Seen) -> None:
    if not draft.config.gkd.trains:
        return
    if not draft.decide("gkd.use_gpu", True, "the cluster has some"):
        _distillation_on_cpus(draft, [])
        return
    length, step = draft.config.data.sequence_length, draft.config.gkd.step_tokens
    whole = step
    if step is not None:
        step //= draft.fixed("gkd.gradient_accumulation") or 1  # what all workers have at a time, at the most
    fixed = draft.fixed("gkd.micro_batch_tokens") or length
    most = next(w for w in range(gpus.num_gpus, 0, -1) if step is None or w == 1 or not step % (w * fixed))
    why = "each GPU is one" if most == gpus.num_gpus else f"of {gpus.num_gpus} GPUs, as many as share a step of {whole} tokens"
    workers = draft.decide("gkd.num_workers", most, why)
    if workers > gpus.num_gpus and draft.open("gkd.min_workers"):
        draft.decide("gkd.min_workers", gpus.num_gpus, f"{workers} workers' micro-batches are shared by those that find a GPU")
    if draft.config.gkd.stages:
        return
    _gkd_micro_batch(draft, sizes, gpus, workers, step)
    if whole is not None:
        _accumulate(draft, whole)
    elif draft.config.gkd.heldout_tokens:
        draft.decide("gkd.learning_rate", "auto", "a step is what the GPUs have room for, and no rate is known for it")


def _gkd_micro_batch(draft: Draft, sizes: Sizes, gpus: Seen, workers: int, step: int | None) -> None:
    """With all activations kept where that leaves micro-batches large enough, else with layers that run twice."""
    name, length, again = "gkd.micro_batch_tokens", draft.config.data.sequence_length, "gkd.activation_checkpointing"
    most = LARGEST_GKD_TOKENS if step is None else min(LARGEST_GKD_TOKENS, max(length, step // workers))

    def needed(config: RunConfig) -> list[Demand]:
        return [gkd_demand(with_workers_that_start(config, gpus.num_gpus), sizes.config, sizes, gpus.gpu_bytes)]

    def divides(tokens: int) -> bool:
        return step is None or not step % (workers * tokens)

    sizes_open = [n for n in powers(length, 0, most) if divides(n)] or [length]
    tried = [draft.fixed(name)] if draft.fixed(name) else sizes_open
    for twice in (False, True) if draft.open(again) else (draft.config.gkd.activation_checkpointing,):
        draft.put(again, twice)
        enough = [n for n in tried if twice or n >= min(BUSY_TOKENS, tried[0])]
        found = next(fitting(draft, [(name, n) for n in enough], needed, gpus), None)
        if found is not None:
            break
    draft.decide(
        again, draft.config.gkd.activation_checkpointing, "activations of all layers have" + (" no room" if twice else " room")
    )
    draft.decide(name, found or tried[-1], f"the most, of at most {most}, that has room")


def _accumulate(draft: Draft, step: int) -> None:
    gkd = draft.config.gkd
    together = gkd.num_workers * gkd.micro_batch_tokens
    draft.decide("gkd.gradient_accumulation", max(1, step // together), f"a step of {step} tokens")


# on CPUs


def _on_cpus(draft: Draft, sizes: Sizes, nodes: Sequence[Node]) -> None:
    for name in AS_SHARES:
        if draft.kept.get(name):
            draft.decide(name, 1.0, f"as {draft.kept_by[name]}; what is not finished waits for GPUs")
    _whole_sequences(draft)
    draft.decide("cluster.num_shards", *_shards_on_cpus(draft, sizes, nodes))
    if draft.config.gkd.trains:
        _distillation_on_cpus(draft, nodes)
    decide_evaluation_on_cpus(draft, sizes, nodes)
    draft.leave(IN_KEYS)


def _with_cpus(nodes: Sequence[Node]) -> int:
    return max(1, sum(node.cpus > 0 for node in nodes))


def _shards_on_cpus(draft: Draft, sizes: Sizes, nodes: Sequence[Node]) -> tuple[int, str]:
    """One for each node, or more, where a node's memory is small for a shard; with the reason."""
    memory, depth = min((node.memory_bytes for node in nodes if node.memory_bytes), default=0), len(sizes.layers)
    shards, why = min(_with_cpus(nodes), depth), "one for each node"
    while memory and draft.open("cluster.num_shards"):
        draft.put("cluster.num_shards", shards)
        found = [*library_demands(draft.config, sizes), scores_demand(draft.config, sizes.config, sizes)]
        if shards == depth or all(d.total <= SHARE_OF_A_NODE * memory for d in found if "shard" in d.process):
            break
        shards, why = shards + 1, f"a node has {memory / GIB:.1f} GiB"
    return shards, why


def _distillation_on_cpus(draft: Draft, nodes: Sequence[Node]) -> None:
    """A worker for each node, where they can share a step."""
    gkd, length, name = draft.config.gkd, draft.config.data.sequence_length, "gkd.micro_batch_tokens"
    if gkd.stages:
        return
    whole = max(1, CPU_TOKENS // length) * length
    step = gkd.step_tokens or gkd.num_workers * gkd.gradient_accumulation * (draft.fixed(name) or whole)
    least = draft.fixed(name) or length
    most = next(w for w in range(_with_cpus(nodes), 0, -1) if w == 1 or not step % (w * least))
    workers = draft.decide("gkd.num_workers", most, "one for each node" if most > 1 else "one has all cores of a node")
    tokens = next((n for n in powers(length, 0, whole) if not step % (workers * n)), length)
    draft.decide(name, tokens, f"a part of a step of {step} tokens")
    _accumulate(draft, step)
