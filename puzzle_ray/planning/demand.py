"""Bytes of every kind of process of a run, counted on the real classes without allocating them, and the work of every stage.

What a process holds by design is counted: weights, gradients, optimizer, remembered activations. What its libraries take beside that is
not. FLOPs are those of matrix products with weights, 2 per weight and token, 6 where it is trained; products inside attention are left
out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from puzzle_ray.artifacts import KINDS, LayerChoice, SearchSpace
from puzzle_ray.calibration import CHANNELS, HEADS, INPUTS, REPLACED
from puzzle_ray.config import RunConfig
from puzzle_ray.distill.parallel import is_sharded
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.models.blocks import stack_without_weights, swapped
from puzzle_ray.models.describe import describe
from puzzle_ray.profiling.memory import subblock_weights, weights_of
from puzzle_ray.scoring.plan import shard_bytes
from puzzle_ray.scoring.replacements import all_replacements
from puzzle_ray.surgery.projections import AttentionProjections, FFNProjections
from puzzle_ray.variants.base import find_variant, needed_statistics

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Demand:
    """What each of `count` equal processes holds, in bytes by kind. With `gpu_share` it is in a GPU's memory, else in the host's."""

    stage: str
    process: str
    count: int
    parts: Mapping[str, int]
    gpu_share: float
    remedy: str

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Work:
    """What a stage computes, and what it writes while it runs."""

    stage: str
    flops: float
    dtype: str
    store_bytes_per_token: int = 0  # hidden states in the object stores, for every token of a micro-batch
    store_bytes: int = 0  # of them at a time
    checkpoint_bytes: int = 0


class Sizes:
    """Parameters of a parent's parts and of all variants."""

    def __init__(self, model_config: Any, space: SearchSpace) -> None:
        self.config, self.space = model_config, space
        self.descriptor: Descriptor = describe(model_config)
        depth = model_config.num_hidden_layers
        self.stack, _ = stack_without_weights(self.descriptor, model_config, 0, depth, torch.float32)
        self.total = weights_of(self.stack.parameters()).num_params
        self.layers = [weights_of(layer.parameters()).num_params for layer in self.stack.layers]
        assert self.stack.head is not None
        self.head = weights_of(self.stack.head.parameters()).num_params
        self._variants: dict[tuple[int, str, str], tuple[int, bool]] = {}

    def variant(self, layer: int, kind: Any, name: str) -> tuple[int, bool]:
        """(parameters, whether they are trained) of a replaced subblock with its norms."""
        key = (self.space.layers.index(self.space.layers[layer]), kind, name)
        if key not in self._variants:
            child = swapped(self.stack.layer(layer), LayerChoice(**{kind: name}), self.descriptor, self.stack.config)
            num_params = subblock_weights(child, kind, self.descriptor).num_params
            self._variants[key] = num_params, bool(find_variant(name, kind)[0].trainable)
        return self._variants[key]

    def choice(self, layer: int, choice: LayerChoice) -> tuple[int, int]:
        """(parameters, trained parameters) of all subblocks that a choice replaces."""
        found = [self.variant(layer, kind, choice.variant(kind)) for kind in choice.replaced]
        return sum(n for n, _ in found), sum(n for n, trained in found if trained)


def _bytes(dtype: str) -> int:
    return _FLOAT32_BYTES if dtype == "float32" else 2


def calibration_bytes(sizes: Sizes, layer: int, choices: Sequence[LayerChoice]) -> int:
    """The moments that these choices of a layer start from, see `puzzle_ray.calibration.Statistics`: in float64, of either half of the
    tokens."""
    own, width, numbers = sizes.stack.layer(layer), int(sizes.config.hidden_size), 0
    needed = [needed_statistics({choice.variant(kind) for choice in choices}, kind) for kind in KINDS]
    for kind in KINDS:
        if isinstance(own.get_submodule(sizes.descriptor.module(kind)), REPLACED):
            continue
        if kind == "ffn":
            inner, features = CHANNELS, FFNProjections.of(own, sizes.descriptor).down.weight_OI.shape[1]
        else:
            inner, features = HEADS, AttentionProjections.of(own, sizes.descriptor).output.weight_OI.shape[1]
        numbers += 2 * (width + 1) * (2 * width + 1) * any(INPUTS in names for names in needed)
        numbers += 2 * features**2 * any(inner in names for names in needed)
    return 8 * numbers


def trainers_of_layers(config: RunConfig, sizes: Sizes) -> list[int]:
    """Over how many trainers the variants of every layer are split."""
    return [max(1, min(config.cluster.trainers_per_layer, len(layer.trained))) for layer in sizes.space.layers]


def trainer_parts(sizes: Sizes, layer: int, accumulate: int = 1, trainers: int = 1) -> dict[str, int]:
    """A block trainer's memory for one layer, beside activations: everything is float32.

    A variant's gradients go with its optimizer step, so one variant has some at a time; where a step takes several micro-batches
    (`accumulate`), all have. With several `trainers` the layer's variants are split, and it is the one that needs most. Calibration is over
    before there are gradients and an optimizer: what it needs beyond their memory is counted.
    """

    def one(number: int) -> dict[str, int]:
        choices = sizes.space.layers[layer].trained[number::trainers]
        found = [sizes.choice(layer, choice) for choice in choices]
        held, trained = sum(n for n, _ in found), [n for _, n in found]
        later = {
            "gradients": (sum(trained) if accumulate > 1 else max(trained, default=0)) * _FLOAT32_BYTES,
            "optimizer": 2 * sum(trained) * _FLOAT32_BYTES,
        }
        beyond = calibration_bytes(sizes, layer, choices) - sum(later.values())
        weights = {"parent layer": sizes.layers[layer], "variants": held, "start weights": held}
        parts = {name: size * _FLOAT32_BYTES for name, size in weights.items()} | later
        return parts | ({"calibration": beyond} if beyond > 0 else {})

    return max((one(number) for number in range(trainers)), key=lambda parts: sum(parts.values()))


def worker_parts(num_params: int, parent_params: int, parent_dtype: str, config: RunConfig, model_config: Any) -> dict[str, int]:
    """A GKD worker's memory: float32 weights, gradients and moments of the child, the parent, every layer's output of both."""
    states = model_config.num_hidden_layers * config.gkd.micro_batch_tokens * model_config.hidden_size
    parts = {
        "child": num_params * _FLOAT32_BYTES,
        "gradients": num_params * _FLOAT32_BYTES,
        "optimizer": 2 * num_params * _FLOAT32_BYTES,
        "parent": parent_params * _bytes(parent_dtype),
        "layer outputs": 2 * states * _bytes(parent_dtype),
    }
    return parts | ({"best weights": num_params * _FLOAT32_BYTES} if config.gkd.heldout_tokens else {})


def sharded_worker_parts(sizes: Sizes, parent_dtype: str, config: RunConfig, model_config: Any) -> dict[str, int]:
    """The same where every worker holds its share (`gkd.parallel: fsdp`), and gathers what it computes with.

    Gathered are the weights that are in no layer (embedding, norm, head) of both models and their gradients, and two layers with the
    gradients of one: the layer that computes, and the one that is fetched meanwhile.
    """
    whole = worker_parts(sizes.total, sizes.total, parent_dtype, config, model_config)
    workers, outputs = config.gkd.num_workers, whole.pop("layer outputs")
    half = parent_dtype != "float32" if config.gkd.compute_dtype == "auto" else config.gkd.compute_dtype == "bfloat16"
    compute_bytes = 2 if half else _FLOAT32_BYTES
    ends, layer = sizes.total - sum(sizes.layers), max(sizes.layers)
    gathered = (2 * ends + 3 * layer) * compute_bytes + ends * _bytes(parent_dtype) + sizes.head * _FLOAT32_BYTES
    return {name: -(-size // workers) for name, size in whole.items()} | {"layer outputs": outputs, "gathered": gathered}


def demands(config: RunConfig, model_config: Any, sizes: Sizes, gpu_bytes: int = 0) -> list[Demand]:
    """What every kind of process needs, of each the one that needs most. The child counts as large as the parent.

    `gpu_bytes` is the memory of a GPU, which `gkd.parallel: auto` looks at; without it GKD's workers hold everything.
    """
    cluster, library, depth = config.cluster, config.library, model_config.num_hidden_layers
    num_shards = min(cluster.num_shards, depth)
    edges = [depth * n // num_shards for n in range(num_shards + 1)]
    runs = [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    state = library.micro_batch_tokens * model_config.hidden_size * _bytes(library.activation_dtype)

    def shard(layers: range) -> dict[str, int]:
        stack, _ = stack_without_weights(
            sizes.descriptor, model_config, layers.start, layers.stop, getattr(torch, library.parent_dtype)
        )
        return {"weights": weights_of(stack.parameters()).weight_bytes, "hidden states": (len(layers) + 1) * state}

    def largest(parts: list[dict[str, int]]) -> dict[str, int]:
        return max(parts, key=lambda part: sum(part.values()))

    own = str(getattr(model_config, "dtype", None) or torch.float32).removeprefix("torch.")
    gkd = _gkd_worker(config, model_config, sizes, own if config.gkd.use_gpu else "float32", gpu_bytes)
    per_trainer = 1 if cluster.blocks_per_trainer == "auto" else int(cluster.blocks_per_trainer)
    splits = trainers_of_layers(config, sizes)
    of_layers = [trainer_parts(sizes, n, library.gradient_accumulation, splits[n]) for n in range(depth)]
    trainer = {name: per_trainer * size for name, size in largest(of_layers).items()}
    timed = 2 * sizes.total * _bytes(config.profile.dtype)
    more_shards = "raise cluster.num_shards"
    of_library = [
        Demand("library", "parent shard", num_shards, largest([shard(r) for r in runs]), cluster.gpus_per_shard, more_shards),
        Demand(
            "library",
            "block trainer",
            sum(splits) if per_trainer == 1 else -(-depth // per_trainer),
            trainer,
            cluster.gpus_per_trainer,
            "lower cluster.blocks_per_trainer, raise cluster.trainers_per_layer, give trainers a larger share of a GPU, "
            "or name fewer variants in space",
        ),
    ]
    if cluster.colocate:
        together = [dict(sum((Counter(of_layers[n]) for n in layers), Counter(shard(layers)))) for layers in runs]
        share = cluster.gpus_per_shard + cluster.gpus_per_trainer
        of_library = [Demand("library", "shard, trainers", num_shards, largest(together), share, more_shards)]
    return [
        *of_library,
        Demand(
            "scores",
            "parent shard",
            num_shards,
            _scoring_parts(config, model_config, sizes, runs),
            cluster.gpus_per_shard,
            f"{more_shards}, set scoring.dtype to bfloat16, or lower scoring.micro_batch_tokens",
        ),
        gkd,
        Demand(
            "evaluation",
            "worker",
            1,
            {"two models": timed},
            float(config.profile.num_gpus),
            "models that do not fit together are timed one after the other",
        ),
    ]


def _scoring_parts(config: RunConfig, model_config: Any, sizes: Sizes, runs: list[range]) -> dict[str, int]:
    """Of the shard that needs most, of those that hold these runs of layers."""
    free, tokens = (0 if config.cluster.gpus_per_shard else None), config.scoring.micro_batch_tokens
    found = [shard_bytes(model_config, sizes.descriptor, layers, config.scoring, tokens, free) for layers in runs]
    most = max(found, key=lambda each: each.total)
    return {"weights": most.weights, "parent's activations": most.kept, "candidates": most.candidates, "working": most.working}


def _gkd_worker(config: RunConfig, model_config: Any, sizes: Sizes, parent_dtype: str, gpu_bytes: int) -> Demand:
    parts, workers = worker_parts(sizes.total, sizes.total, parent_dtype, config, model_config), config.gkd.num_workers
    remedy = "every worker holds the whole child and the whole parent: set gkd.parallel to fsdp, and raise gkd.num_workers"
    held = sum(parts.values()) - parts["layer outputs"]
    if is_sharded(config.gkd, held, gpu_bytes or held << 1, workers):
        parts = sharded_worker_parts(sizes, parent_dtype, config, model_config)
        remedy = "raise gkd.num_workers, so that each holds less, or lower gkd.micro_batch_tokens"
    return Demand("gkd", "worker", workers, parts, float(config.gkd.use_gpu), remedy)


def works(config: RunConfig, model_config: Any, sizes: Sizes) -> list[Work]:
    """What the heavy stages compute."""
    library, depth = config.library, model_config.num_hidden_layers
    trained, splits = 0.0, trainers_of_layers(config, sizes)
    for layer in range(depth):
        # in every trainer once more: the parent's attention half, and the halves beside a variant
        halves = sizes.layers[layer] * splits[layer]
        found = [sizes.choice(layer, choice) for choice in sizes.space.layers[layer].trained]
        trained += 2 * halves + sum(2 * n + 4 * t for n, t in found)
    store = (depth + 1) * model_config.hidden_size * _bytes(library.activation_dtype)
    behind = [sum(sizes.layers[n:]) + sizes.head for n in range(depth)]
    scored = sum(2.0 * behind[r.layer] for r in all_replacements(sizes.space, config.scoring.granularity))
    checkpoint = sum(sum(trainer_parts(sizes, n)[k] for k in ("variants", "start weights", "optimizer")) for n in range(depth))
    gkd = 8.0 * sizes.total * config.gkd.tokens
    guard = sizes.total * _FLOAT32_BYTES if config.gkd.heldout_tokens else 0
    return [
        Work(
            "library",
            library.tokens * (2.0 * sum(sizes.layers) + trained),
            library.compute_dtype,
            store,
            store * library.micro_batch_tokens * library.in_flight(min(config.cluster.num_shards, depth)),
            checkpoint,
        ),
        Work("scores", config.scoring.tokens * scored, config.scoring.dtype),
        Work("gkd", gkd, "bfloat16" if config.gkd.use_gpu else "float32", 0, 0, 3 * sizes.total * _FLOAT32_BYTES + guard),
    ]
