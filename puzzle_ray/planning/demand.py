"""Bytes of every kind of process of a run, counted on the real classes without allocating them, and the work of every stage.

What a process holds by design is counted: weights, gradients, optimizer, activations that wait for the backward pass. What its
libraries take beside that is not. FLOPs are those of matrix products with weights, 2 per weight and token, 6 where it is trained;
products inside attention are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from puzzle_ray.artifacts import KINDS, LayerChoice, SearchSpace
from puzzle_ray.calibration import CHANNELS, HEADS, INPUTS, REPLACED
from puzzle_ray.config import RunConfig
from puzzle_ray.distill.parallel import is_sharded
from puzzle_ray.distill.settings import AUTO, GkdConfig, LibraryConfig
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.models.blocks import stack_without_weights, swapped
from puzzle_ray.models.describe import describe
from puzzle_ray.models.head import chunk_tokens
from puzzle_ray.planning.activations import kept_bytes_per_token
from puzzle_ray.profiling.memory import subblock_weights, weights_of
from puzzle_ray.scoring.plan import ShardBytes, shard_bytes
from puzzle_ray.scoring.replacements import all_replacements
from puzzle_ray.surgery.projections import AttentionProjections, FFNProjections
from puzzle_ray.variants.base import find_variant, needed_statistics

_FLOAT32_BYTES = 4
_ENDS = "gradients of the ends"
_STATES_OF_A_TRAINER = (
    7  # float32 hidden states beside a layer's own: input, middle and output of the parent, those of a child, the loss
)
_LOGITS_AT_ONCE = 6  # float32 tensors of the size of a chunk's logits, see `puzzle_ray.distill.head_losses`


@dataclass(frozen=True)
class Demand:
    """What each of `count` equal processes holds, in bytes by kind. With `gpu_share` it is in a GPU's memory, else in the host's.

    `host` is what it has in the host's memory beside that. `remedy` is for a process that does not fit, `fewer` for too many of them.
    """

    stage: str
    process: str
    count: int
    parts: Mapping[str, int]
    gpu_share: float
    remedy: str
    fewer: str = "ask for fewer or for smaller shares"
    host: Mapping[str, int] = field(default_factory=dict)

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
    gpus: float = 0  # that it uses at the most; 0: as many as there are


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
        # equal layers have one number: what is counted of one holds for all
        self.kinds = [self.layers.index(size) * depth + space.layers.index(space.layers[n]) for n, size in enumerate(self.layers)]
        self._variants: dict[tuple[int, str, str], tuple[int, bool]] = {}
        self._shards: dict[tuple[range, str], int] = {}
        self._trainers: dict[tuple[int, int, int], dict[str, int]] = {}

    def distinct(self, runs: Sequence[range]) -> list[range]:
        """One of each sort of equal runs of layers."""
        depth = len(self.layers)
        found = {(tuple(self.kinds[n] for n in run), run.start == 0, run.stop == depth): run for run in runs}
        return list(found.values())

    def trainer(self, layer: int, accumulate: int = 1, trainers: int = 1) -> dict[str, int]:
        """`trainer_parts`, counted once for equal layers."""
        key = self.kinds[layer], accumulate, trainers
        if key not in self._trainers:
            self._trainers[key] = trainer_parts(self, layer, accumulate, trainers)
        return self._trainers[key]

    def shard_bytes(self, layers: range, dtype: str) -> int:
        """The weights of a shard with some layers, embedding and head of those at the ends included."""
        if (layers, dtype) not in self._shards:
            stack, _ = stack_without_weights(self.descriptor, self.config, layers.start, layers.stop, getattr(torch, dtype))
            self._shards[layers, dtype] = weights_of(stack.parameters()).weight_bytes
        return self._shards[layers, dtype]

    def variant(self, layer: int, kind: Any, name: str) -> tuple[int, bool]:
        """(parameters, whether they are trained) of a replaced subblock with its norms."""
        key = (self.kinds[layer], kind, name)
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


def trainer_activations(sizes: Sizes, layer: int, library: LibraryConfig) -> int:
    """What a step of one variant keeps beside that. With autocast, a copy of the layer's weights in bfloat16 is kept, too."""
    half, hidden_size = library.compute_dtype == "bfloat16", sizes.config.hidden_size
    kept = kept_bytes_per_token(sizes.stack.layer(layer), hidden_size, 2 if half else _FLOAT32_BYTES)
    kept += _STATES_OF_A_TRAINER * hidden_size * _FLOAT32_BYTES
    return library.micro_batch_tokens * kept + (2 * sizes.layers[layer] if half else 0)


def group_parts(
    sizes: Sizes, layers: Sequence[int], library: LibraryConfig, on_gpu: bool, trainers: int = 1
) -> tuple[dict[str, int], dict[str, int]]:
    """What the trainers of some layers hold in one process, where they work one after the other: on its device, and beside a GPU.

    What a checkpoint is written from in the background is a copy. A layer may be split over several `trainers`.
    """
    accumulate = library.gradient_accumulation
    found = [sizes.trainer(n, accumulate, trainers) for n in layers]
    parts = {name: sum(each.get(name, 0) for each in found) for name in {name: None for each in found for name in each}}
    parts["gradients"] = (sum if accumulate > 1 else max)(each["gradients"] for each in found)
    parts["activations"] = max(trainer_activations(sizes, n, library) for n in layers)
    aside = {} if library.checkpoint_every else {"checkpoint copies": parts["variants"] + parts["optimizer"]}
    if not on_gpu:
        return parts | aside, {}
    return {name: size for name, size in parts.items() if name != "start weights"}, {
        "start weights": parts["start weights"]
    } | aside


def worker_parts(num_params: int, parent_params: int, parent_dtype: str, config: RunConfig, model_config: Any) -> dict[str, int]:
    """A GKD worker's memory: float32 weights, gradients and moments of the child, the parent, every layer's output of both.

    The gradient of the embedding or the head exists twice more before it is added to the others.
    """
    states = model_config.num_hidden_layers * config.gkd.micro_batch_tokens * model_config.hidden_size
    parts = {
        "child": num_params * _FLOAT32_BYTES,
        "gradients": num_params * _FLOAT32_BYTES,
        "optimizer": 2 * num_params * _FLOAT32_BYTES,
        "parent": parent_params * _bytes(parent_dtype),
        "layer outputs": 2 * states * _bytes(parent_dtype),
        _ENDS: 2 * model_config.vocab_size * model_config.hidden_size * _FLOAT32_BYTES,
    }
    copies = {"best weights": config.gkd.heldout_tokens, "average": config.gkd.average_weights}
    return parts | {name: num_params * _FLOAT32_BYTES for name, there in copies.items() if there}


def _computes_in_half(gkd: GkdConfig, parent_dtype: str) -> bool:
    """Whether a child computes in bfloat16, by what `gkd.compute_dtype` says of workers whose parent is in this dtype."""
    return (gkd.use_gpu and parent_dtype != "float32") if gkd.compute_dtype == AUTO else gkd.compute_dtype == "bfloat16"


def worker_activations(sizes: Sizes, parent_dtype: str, gkd: GkdConfig) -> int:
    """What a step keeps of the child for its backward pass, and a few tokens' logits."""
    size = 2 if _computes_in_half(gkd, parent_dtype) else _FLOAT32_BYTES
    each = max(kept_bytes_per_token(layer, sizes.config.hidden_size, size) for layer in sizes.stack.layers)
    layers = 1 if gkd.activation_checkpointing else len(sizes.layers)
    vocab_size = sizes.config.vocab_size
    tokens = min(gkd.micro_batch_tokens, chunk_tokens(vocab_size, torch.device("cuda" if gkd.use_gpu else "cpu")))
    return gkd.micro_batch_tokens * layers * each + _LOGITS_AT_ONCE * tokens * vocab_size * _FLOAT32_BYTES


def sharded_worker_parts(sizes: Sizes, parent_dtype: str, config: RunConfig, model_config: Any) -> dict[str, int]:
    """The same where every worker holds its share (`gkd.parallel: fsdp`), and gathers what it computes with.

    Gathered are the weights that are in no layer (embedding, norm, head) of both models and their gradients, and two layers with the
    gradients of one: the layer that computes, and the one that is fetched meanwhile.
    """
    whole = worker_parts(sizes.total, sizes.total, parent_dtype, config, model_config)
    workers, outputs = config.gkd.num_workers, whole.pop("layer outputs")
    del whole[_ENDS]  # they are among what is gathered
    compute_bytes = 2 if _computes_in_half(config.gkd, parent_dtype) else _FLOAT32_BYTES
    ends, layer = sizes.total - sum(sizes.layers), max(sizes.layers)
    gathered = (2 * ends + 3 * layer) * compute_bytes + ends * _bytes(parent_dtype) + sizes.head * _FLOAT32_BYTES
    return {name: -(-size // workers) for name, size in whole.items()} | {"layer outputs": outputs, "gathered": gathered}


def demands(config: RunConfig, model_config: Any, sizes: Sizes, gpu_bytes: int = 0) -> list[Demand]:
    """What every kind of process needs, of each the one that needs most. The child counts as large as the parent.

    `gpu_bytes` is the memory of a GPU, which `gkd.parallel: auto` and the evaluation look at; 0 where it is not known.
    """
    found = [*library_demands(config, sizes), scores_demand(config, model_config, sizes)]
    return [*found, gkd_demand(config, model_config, sizes, gpu_bytes), evaluation_demand(config, sizes, gpu_bytes)]


def _runs(num_layers: int, num_shards: int) -> list[range]:
    count = min(num_shards, num_layers)
    edges = [num_layers * n // count for n in range(count + 1)]
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def _total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())


def library_demands(config: RunConfig, sizes: Sizes) -> list[Demand]:
    """Of parent shards and block trainers, or of shards with their trainers in one process."""
    cluster, library, depth = config.cluster, config.library, len(sizes.layers)
    runs = _runs(depth, cluster.num_shards)
    state = library.micro_batch_tokens * sizes.config.hidden_size * _bytes(library.activation_dtype)

    def shard(layers: range) -> dict[str, int]:
        return {"weights": sizes.shard_bytes(layers, library.parent_dtype), "hidden states": (len(layers) + 1) * state}

    def group(layers: Sequence[int], trainers: int = 1) -> tuple[dict[str, int], dict[str, int]]:
        return group_parts(sizes, layers, library, cluster.gpus_per_trainer > 0, trainers)

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
    runs = _runs(len(sizes.layers), config.cluster.num_shards)
    how = (config.scoring, tokens, free)
    found: list[ShardBytes] = [shard_bytes(model_config, sizes.descriptor, run, *how) for run in sizes.distinct(runs)]
    most = max(found, key=lambda each: each.total)
    parts = {
        "weights": most.weights,
        "parent's activations": most.kept,
        "candidates": most.candidates,
        "working": most.working,
    }
    remedy = "raise cluster.num_shards, set scoring.dtype to bfloat16, or lower scoring.micro_batch_tokens"
    return Demand("scores", "parent shard", len(runs), parts, config.cluster.gpus_per_shard, remedy, "lower cluster.num_shards")


def gkd_demand(config: RunConfig, model_config: Any, sizes: Sizes, gpu_bytes: int) -> Demand:
    """Of a worker of the distillation."""
    gkd = config.gkd
    own = str(getattr(model_config, "dtype", None) or torch.float32).removeprefix("torch.") if gkd.use_gpu else "float32"
    own = own if gkd.parent_dtype == AUTO else gkd.parent_dtype
    parts = worker_parts(sizes.total, sizes.total, own, config, model_config)
    remedy = "every worker holds the whole child and the whole parent: set gkd.parallel to fsdp, and raise gkd.num_workers"
    held = _total(parts) - parts["layer outputs"] - parts[_ENDS]
    if is_sharded(gkd, held, gpu_bytes or held << 1, gkd.num_workers):
        parts = sharded_worker_parts(sizes, own, config, model_config)
        remedy = "raise gkd.num_workers, so that each holds less, or lower gkd.micro_batch_tokens"
    parts["activations"] = worker_activations(sizes, own, gkd)
    remedy += "" if gkd.activation_checkpointing else ", or set gkd.activation_checkpointing to true"
    return Demand("gkd", "worker", gkd.num_workers, parts, float(gkd.use_gpu), remedy, "lower gkd.num_workers")


def evaluation_demand(config: RunConfig, sizes: Sizes, gpu_bytes: int) -> Demand:
    """Of who times models: two together where they fit, else one after the other."""
    profile = config.profile
    each = sizes.total * (2 if profile.dtype == "fp8" else _bytes(profile.dtype))  # what is estimated in fp8 is timed in bfloat16
    alone = bool(profile.num_gpus and gpu_bytes and 2 * each > gpu_bytes)
    parts = {"one model": each} if alone else {"two models": 2 * each}
    vocab_size = sizes.config.vocab_size
    tokens = min(
        config.evaluate.micro_batch_tokens, chunk_tokens(vocab_size, torch.device("cuda" if profile.num_gpus else "cpu"))
    )
    parts["logits"] = 4 * tokens * vocab_size * _FLOAT32_BYTES  # of both models, and their log-probabilities
    remedy = "set profile.num_gpus to 0: what no GPU holds is evaluated in the host's memory"
    return Demand("evaluation", "worker", 1, parts, float(profile.num_gpus), remedy)


def works(config: RunConfig, model_config: Any, sizes: Sizes) -> list[Work]:
    """What the heavy stages compute."""
    library, depth = config.library, model_config.num_hidden_layers
    trained, splits = 0.0, trainers_of_layers(config, sizes)
    for layer in range(depth):
        # in every trainer once more: the parent's attention half, and the halves beside a variant
        halves = sizes.layers[layer] * splits[layer]
        found = [sizes.choice(layer, choice) for choice in sizes.space.layers[layer].trained]
        trained += 2 * halves + sum(2 * n + 4 * t for n, t in found)
    shards = min(config.cluster.num_shards, depth)
    states = (shards if config.cluster.colocate else depth) + 1  # in one process, only those between shards travel
    store = states * model_config.hidden_size * _bytes(library.activation_dtype)
    behind = [sum(sizes.layers[n:]) + sizes.head for n in range(depth)]
    scored = sum(2.0 * behind[r.layer] for r in all_replacements(sizes.space, config.scoring.granularity))
    checkpoint = sum(sum(sizes.trainer(n)[k] for k in ("variants", "start weights", "optimizer")) for n in range(depth))
    gkd = 8.0 * sizes.total * config.gkd.tokens
    copies = 3 + bool(config.gkd.heldout_tokens) + config.gkd.average_weights
    used = sum(demand.gpu_share * demand.count for demand in library_demands(config, sizes))
    return [
        Work(
            "library",
            library.tokens * (2.0 * sum(sizes.layers) + trained),
            library.compute_dtype,
            store,
            store * library.micro_batch_tokens * library.in_flight(shards),
            checkpoint,
            used,
        ),
        Work("scores", config.scoring.tokens * scored, config.scoring.dtype),
        Work(
            "gkd",
            gkd,
            "bfloat16" if config.gkd.use_gpu else "float32",
            checkpoint_bytes=copies * sizes.total * _FLOAT32_BYTES,
            gpus=config.gkd.num_workers * float(config.gkd.use_gpu),
        ),
    ]
