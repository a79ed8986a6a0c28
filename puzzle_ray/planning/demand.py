"""Bytes of every kind of process of a run, counted on the real classes without allocating them, and the work of every stage.

What a process holds by design is counted: weights, gradients, optimizer, activations that wait for the backward pass. What its
libraries take beside that is not. FLOPs are those of matrix products with weights, 2 per weight and token, 6 where it is trained and 4
where a gradient only passes through; products inside attention are left out, and an embedding is no product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from puzzle_ray.artifacts import KINDS, PARENT
from puzzle_ray.config import RunConfig
from puzzle_ray.distill.schedule import Schedule
from puzzle_ray.distill.settings import AUTO
from puzzle_ray.models.shards import runs_of_layers
from puzzle_ray.planning.activations import masks_of
from puzzle_ray.planning.block_training import group_parts, trainer_of, trainers_of_layers
from puzzle_ray.planning.distilling import candidates_demand, gkd_demand, tokens_before_pick, tokens_of_gkd
from puzzle_ray.planning.evaluating import evaluation_demands
from puzzle_ray.planning.needs import Demand, Work
from puzzle_ray.planning.sizes import FLOAT32_BYTES, Sizes
from puzzle_ray.scoring.plan import dtype_bytes, shard_bytes
from puzzle_ray.scoring.replacements import all_replacements

__all__ = ["Demand", "Sizes", "Work", "demands", "works"]


def demands(config: RunConfig, model_config: Any, sizes: Sizes, gpu_bytes: int = 0) -> list[Demand]:
    """What every kind of process needs, of each the one that needs most. The child counts as large as the parent.

    `gpu_bytes` is the memory of a GPU, which `gkd.parallel: auto` and the evaluation look at; 0 where it is not known.
    """
    found = [*library_demands(config, sizes), scores_demand(config, model_config, sizes)]
    found += [candidates_demand(config, model_config, sizes)] if config.search.distils else []
    return [*found, gkd_demand(config, model_config, sizes, gpu_bytes), *evaluation_demands(config, sizes, gpu_bytes)]


def _total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())


def library_demands(config: RunConfig, sizes: Sizes) -> list[Demand]:
    """Of parent shards and block trainers, or of shards with their trainers in one process."""
    cluster, library, depth = config.cluster, config.library, len(sizes.layers)
    runs = runs_of_layers(depth, cluster.num_shards)
    state = library.micro_batch_tokens * sizes.config.hidden_size * dtype_bytes(library.activation_dtype)

    def shard(layers: range) -> dict[str, int]:
        own = {"weights": sizes.shard_bytes(layers, library.parent_dtype), "hidden states": (len(layers) + 1) * state}
        return own | masks_of(config, sizes.config, library.micro_batch_tokens, dtype_bytes(library.parent_dtype))

    def group(layers: Sequence[int], trainers: int = 1) -> tuple[dict[str, int], dict[str, int]]:
        parts, host = group_parts(sizes, layers, library, cluster.gpus_per_trainer > 0, trainers)
        return parts | masks_of(config, sizes.config, library.micro_batch_tokens, dtype_bytes(library.compute_dtype)), host

    variants = "lower library.micro_batch_tokens, or name fewer variants in space"
    more_shards, fewer = "raise cluster.num_shards", "lower cluster.num_shards"
    distinct = sizes.distinct(runs)
    if cluster.colocate:
        found = [(layers, *group(layers)) for layers in distinct]
        layers, parts, host = max(found, key=lambda each: _total(each[1]) + _total(shard(each[0])))
        together = dict(Counter(shard(layers)) + Counter(parts))
        share = cluster.gpus_per_shard + cluster.gpus_per_trainer
        remedy = f"{more_shards}, so that each has fewer layers, {variants}"
        return [Demand("library", "shard, trainers", len(runs), together, share, remedy, fewer, host)]
    per_trainer = 1 if cluster.blocks_per_trainer == AUTO else int(cluster.blocks_per_trainer)
    groups = [layers[n : n + per_trainer] for layers in runs for n in range(0, len(layers), per_trainer)]
    of_layers = trainers_of_layers(config, sizes)
    splits = [of_layers[layers.start] if len(layers) == 1 else 1 for layers in groups]
    kinds = {
        split: sizes.distinct([layers for layers, own in zip(groups, splits, strict=True) if own == split]) for split in splits
    }
    held = [group(layers, split) for split, each in kinds.items() for layers in each]
    parts, host = max(held, key=lambda each: _total(each[0]))
    shards = max(map(shard, distinct), key=_total)
    remedy = (
        f"lower cluster.blocks_per_trainer, raise cluster.trainers_per_layer, give trainers a larger share of a GPU, {variants}"
    )
    return [
        Demand("library", "parent shard", len(runs), shards, cluster.gpus_per_shard, more_shards, fewer),
        Demand("library", "block trainer", sum(splits), parts, cluster.gpus_per_trainer, remedy, host=host),
    ]


def scores_demand(config: RunConfig, model_config: Any, sizes: Sizes) -> Demand:
    """Of the shard that needs most."""
    free, tokens = (0 if config.cluster.gpus_per_shard else None), config.scoring.micro_batch_tokens
    runs = runs_of_layers(len(sizes.layers), config.cluster.num_shards)
    how = (config.scoring, tokens, free, config.data.sequence_length * config.data.document_mask)
    found = [shard_bytes(model_config, sizes.descriptor, run, *how) for run in sizes.distinct(runs)]
    most = max(found, key=lambda each: each.total)
    parts = {
        "weights": most.weights,
        "parent's activations": most.kept,
        "candidates": most.candidates,
        "working": most.working,
    }
    remedy = "raise cluster.num_shards, set scoring.dtype to bfloat16, or lower scoring.micro_batch_tokens"
    return Demand("scores", "parent shard", len(runs), parts, config.cluster.gpus_per_shard, remedy, "lower cluster.num_shards")


def works(config: RunConfig, model_config: Any, sizes: Sizes) -> list[Work]:
    """What the heavy stages compute."""
    library, depth = config.library, model_config.num_hidden_layers
    trained, splits = 0.0, trainers_of_layers(config, sizes)
    for layer in range(depth):
        attention, ffn = (sizes.variant(layer, kind, PARENT)[0] for kind in KINDS)
        trained += 2 * attention * splits[layer]  # in every trainer once more
        for choice in sizes.space.layers[layer].trained:
            held, own = sizes.choice(layer, choice)
            if own:  # behind an attention alone stands the parent's FFN, and the gradient comes through it
                trained += 2 * held + 4 * own + (4 * ffn if choice.replaced == ("attention",) else 0)
    shards = min(config.cluster.num_shards, depth)
    states = (shards if config.cluster.colocate else depth) + 1  # in one process, only those between shards travel
    store = states * model_config.hidden_size * dtype_bytes(library.activation_dtype)
    store += 4 * config.data.document_mask  # position ids go along
    behind = [sum(sizes.layers[n:]) + sizes.head for n in range(depth)]
    scored = sum(2.0 * behind[r.layer] for r in all_replacements(sizes.space, config.scoring.granularity))
    checkpoint = sum(sum(trainer_of(sizes, n)[k] for k in ("variants", "start weights", "optimizer")) for n in range(depth))
    used = sum(demand.gpu_share * demand.count for demand in library_demands(config, sizes))
    trained_on = library.tokens + Schedule.of(library.for_parent(model_config)).trials * library.micro_batch_tokens
    stages = [
        Work(
            "library",
            trained_on * (2.0 * sum(sizes.layers) + trained),
            library.compute_dtype,
            store,
            store * library.micro_batch_tokens * library.in_flight(shards),
            checkpoint,
            used,
            on_gpus=config.cluster.gpus_per_trainer > 0 or (config.cluster.colocate and used > 0),
        ),
        Work("scores", config.scoring.tokens * scored, config.scoring.dtype, on_gpus=config.cluster.gpus_per_shard > 0),
    ]
    if config.search.distils:
        stages.append(_distillation("architecture", config, sizes, tokens_before_pick(config), config.search.most_distilled))
    return [*stages, _distillation("gkd", config, sizes, tokens_of_gkd(config), config.gkd.num_workers)]


def _distillation(stage: str, config: RunConfig, sizes: Sizes, tokens: int, processes: int) -> Work:
    """A forward pass of the parent, both passes of a child, by so many processes, and what is recomputed; a checkpoint is of one child."""
    gkd, dtype = config.gkd, "bfloat16" if config.gkd.use_gpu else "float32"
    copies = 3 + bool(gkd.heldout_tokens) + gkd.average_weights  # weights and moments, the best weights, their average
    checkpoint = copies * sizes.total * FLOAT32_BYTES
    layers = sum(sizes.layers)
    each = 8.0 * (layers + sizes.head) + 2.0 * layers * gkd.activation_checkpointing
    return Work(
        stage, each * tokens, dtype, checkpoint_bytes=checkpoint, gpus=processes * float(gkd.use_gpu), on_gpus=gkd.use_gpu
    )
