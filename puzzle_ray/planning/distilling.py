"""What the workers of global distillation (GKD) hold: a whole child each, or a shard of it; and who distils candidates before the pick."""

from __future__ import annotations

from typing import Any

import torch

from puzzle_ray.config import RunConfig
from puzzle_ray.distill.parallel import is_sharded
from puzzle_ray.distill.race import losers_steps
from puzzle_ray.distill.range_test import MOST_TRIALS, trial_steps
from puzzle_ray.distill.settings import AUTO, GkdConfig
from puzzle_ray.models.head import chunk_tokens
from puzzle_ray.planning.activations import computes_in_half, kept_bytes_per_token, masks_of
from puzzle_ray.planning.needs import Demand
from puzzle_ray.planning.sizes import FLOAT32_BYTES, Sizes
from puzzle_ray.scoring.plan import dtype_bytes

_ENDS = "gradients of the ends"
_LOGITS_AT_ONCE = 6  # float32 tensors of the size of a chunk's logits, see `puzzle_ray.distill.head_losses`


def worker_parts(num_params: int, parent_params: int, parent_dtype: str, config: RunConfig, model_config: Any) -> dict[str, int]:
    """A GKD worker's memory: float32 weights, gradients and moments of the child, the parent, every layer's output of both.

    The gradient of the embedding or the head exists twice more before it is added to the others.
    """
    states = model_config.num_hidden_layers * config.gkd.largest_micro_batch * model_config.hidden_size
    parts = {
        "child": num_params * FLOAT32_BYTES,
        "gradients": num_params * FLOAT32_BYTES,
        "optimizer": 2 * num_params * FLOAT32_BYTES,
        "parent": parent_params * dtype_bytes(parent_dtype),
        "layer outputs": 2 * states * dtype_bytes(parent_dtype),
        _ENDS: 2 * model_config.vocab_size * model_config.hidden_size * FLOAT32_BYTES,
    }
    copies = {"best weights": config.gkd.heldout_tokens, "average": config.gkd.average_weights}
    return parts | {name: num_params * FLOAT32_BYTES for name, there in copies.items() if there}


def worker_activations(sizes: Sizes, parent_dtype: str, gkd: GkdConfig) -> int:
    """What a step keeps of the child for its backward pass, and a few tokens' logits."""
    size = 2 if computes_in_half(gkd, parent_dtype) else FLOAT32_BYTES
    each = max(kept_bytes_per_token(layer, sizes.config.hidden_size, size) for layer in sizes.stack.layers)
    layers = 1 if gkd.activation_checkpointing else len(sizes.layers)
    vocab_size = sizes.config.vocab_size
    tokens = min(gkd.largest_micro_batch, chunk_tokens(vocab_size, torch.device("cuda" if gkd.use_gpu else "cpu")))
    return gkd.largest_micro_batch * layers * each + _LOGITS_AT_ONCE * tokens * vocab_size * FLOAT32_BYTES


def sharded_worker_parts(sizes: Sizes, parent_dtype: str, config: RunConfig, model_config: Any) -> dict[str, int]:
    """The same where every worker holds its share (`gkd.parallel: fsdp`), and gathers what it computes with.

    Gathered are the weights that are in no layer (embedding, norm, head) of both models and their gradients, and two layers with the
    gradients of one: the layer that computes, and the one that is fetched meanwhile.
    """
    whole = worker_parts(sizes.total, sizes.total, parent_dtype, config, model_config)
    workers, outputs = config.gkd.num_workers, whole.pop("layer outputs")
    del whole[_ENDS]  # they are among what is gathered
    compute_bytes = 2 if computes_in_half(config.gkd, parent_dtype) else FLOAT32_BYTES
    ends, layer = sizes.total - sum(sizes.layers), max(sizes.layers)
    gathered = (2 * ends + 3 * layer) * compute_bytes + ends * dtype_bytes(parent_dtype) + sizes.head * FLOAT32_BYTES
    return {name: -(-size // workers) for name, size in whole.items()} | {"layer outputs": outputs, "gathered": gathered}


def _parent_dtype(gkd: GkdConfig, model_config: Any) -> str:
    own = str(getattr(model_config, "dtype", None) or torch.float32).removeprefix("torch.") if gkd.use_gpu else "float32"
    return own if gkd.parent_dtype == AUTO else gkd.parent_dtype


def _masks(config: RunConfig, parent_dtype: str, model_config: Any) -> dict[str, int]:
    gkd = config.gkd
    layers = 1 if gkd.activation_checkpointing else model_config.num_hidden_layers
    size, longest = (
        2 if computes_in_half(gkd, parent_dtype) else FLOAT32_BYTES,
        max((s.sequence_length for s in gkd.stages), default=0),
    )
    return masks_of(config, model_config, gkd.largest_micro_batch, size, layers, longest)


def gkd_demand(config: RunConfig, model_config: Any, sizes: Sizes, gpu_bytes: int) -> Demand:
    """Of a worker of the distillation."""
    gkd, own = config.gkd, _parent_dtype(config.gkd, model_config)
    parts = worker_parts(sizes.total, sizes.total, own, config, model_config)
    remedy = "every worker holds the whole child and the whole parent: set gkd.parallel to fsdp, and raise gkd.num_workers"
    held = sum(parts.values()) - parts["layer outputs"] - parts[_ENDS]
    if is_sharded(gkd, held, gpu_bytes or held << 1, gkd.num_workers):
        parts = sharded_worker_parts(sizes, own, config, model_config)
        remedy = "raise gkd.num_workers, so that each holds less, or lower gkd.micro_batch_tokens"
    parts["activations"] = worker_activations(sizes, own, gkd)
    parts |= _masks(config, own, model_config)
    remedy += "" if gkd.activation_checkpointing else ", or set gkd.activation_checkpointing to true"
    return Demand("gkd", "worker", gkd.num_workers, parts, float(gkd.use_gpu), remedy, "lower gkd.num_workers")


def candidates_demand(config: RunConfig, model_config: Any, sizes: Sizes) -> Demand:
    """Of who distils a candidate before the pick (`search.distil_tokens`, `search.race_rungs`): a process does the work of all workers,
    and holds it whole."""
    before = config.model_copy(update={"gkd": config.gkd_before_pick})
    gkd, own = before.gkd, _parent_dtype(config.gkd, model_config)
    parts = worker_parts(sizes.total, sizes.total, own, before, model_config)
    parts["activations"] = worker_activations(sizes, own, gkd)
    parts |= _masks(before, own, model_config)
    name = "race_rungs" if config.search.race_rungs else "distil_tokens"
    remedy = f"set search.{name} to 0: each candidate is distilled in one process"
    count = config.search.most_distilled
    return Demand("architecture", "candidate", count, parts, float(gkd.use_gpu), remedy, waits=True)


def range_test_tokens(gkd: GkdConfig) -> int:
    """What a child's test of learning rates reads, at the most; 0 where the rate is given."""
    if gkd.learning_rate != AUTO or not gkd.trains:
        return 0
    return MOST_TRIALS * gkd.tokens_until(trial_steps(gkd.total_steps))


def tokens_of_gkd(config: RunConfig) -> int:
    """Of the child's distillation, the test of its learning rate among them."""
    return config.gkd.total_tokens + range_test_tokens(config.gkd)


def tokens_before_pick(config: RunConfig) -> int:
    """Of all candidates that are distilled before one is picked, at the most; of a race what the losers read, for the winner goes on.

    Each candidate tests its own learning rates.
    """
    search, gkd = config.search, config.gkd_before_pick
    if not search.race_rungs:
        return (gkd.total_tokens + range_test_tokens(gkd)) * search.most_candidates
    steps = gkd.race_steps(search.race_rungs)
    losers = search.most_racing - 1 if steps else 0
    return losers * range_test_tokens(gkd) + losers_steps(search.most_racing, [gkd.tokens_until(step) for step in steps])
