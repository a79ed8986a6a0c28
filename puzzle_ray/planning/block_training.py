"""What the trainers of block distillation (BLD) hold, layer by layer, and with several layers in one process."""

from __future__ import annotations

from collections.abc import Sequence

from puzzle_ray.artifacts import KINDS, LayerChoice
from puzzle_ray.calibration import CHANNELS, HEADS, INPUTS, REPLACED
from puzzle_ray.config import RunConfig
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.planning.activations import kept_bytes_per_token
from puzzle_ray.planning.sizes import FLOAT32_BYTES, Sizes
from puzzle_ray.surgery.projections import AttentionProjections, FFNProjections
from puzzle_ray.variants.base import needed_statistics

# Float32 hidden states beside a layer's own: input, middle and output of the parent, those of a child, the loss.
_STATES_OF_A_TRAINER = 7


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
            "gradients": (sum(trained) if accumulate > 1 else max(trained, default=0)) * FLOAT32_BYTES,
            "optimizer": 2 * sum(trained) * FLOAT32_BYTES,
        }
        beyond = calibration_bytes(sizes, layer, choices) - sum(later.values())
        weights = {"parent layer": sizes.layers[layer], "variants": held, "start weights": held}
        parts = {name: size * FLOAT32_BYTES for name, size in weights.items()} | later
        return parts | ({"calibration": beyond} if beyond > 0 else {})

    return max((one(number) for number in range(trainers)), key=lambda parts: sum(parts.values()))


def trainer_of(sizes: Sizes, layer: int, accumulate: int = 1, trainers: int = 1) -> dict[str, int]:
    """`trainer_parts`, counted once for equal layers."""
    key = sizes.kinds[layer], accumulate, trainers
    if key not in sizes.trainers:
        sizes.trainers[key] = trainer_parts(sizes, layer, accumulate, trainers)
    return sizes.trainers[key]


def trainer_activations(sizes: Sizes, layer: int, library: LibraryConfig) -> int:
    """What a step of one variant keeps beside that. With autocast, a copy of the layer's weights in bfloat16 is kept, too."""
    half, hidden_size = library.compute_dtype == "bfloat16", sizes.config.hidden_size
    kept = kept_bytes_per_token(sizes.stack.layer(layer), hidden_size, 2 if half else FLOAT32_BYTES)
    kept += _STATES_OF_A_TRAINER * hidden_size * FLOAT32_BYTES
    return library.micro_batch_tokens * kept + (2 * sizes.layers[layer] if half else 0)


def group_parts(
    sizes: Sizes, layers: Sequence[int], library: LibraryConfig, on_gpu: bool, trainers: int = 1
) -> tuple[dict[str, int], dict[str, int]]:
    """What the trainers of some layers hold in one process, where they work one after the other: on its device, and beside a GPU.

    What a checkpoint is written from in the background is a copy. A layer may be split over several `trainers`.
    """
    accumulate = library.gradient_accumulation
    found = [trainer_of(sizes, n, accumulate, trainers) for n in layers]
    parts = {name: sum(each.get(name, 0) for each in found) for name in {name: None for each in found for name in each}}
    parts["gradients"] = (sum if accumulate > 1 else max)(each["gradients"] for each in found)
    parts["activations"] = max(trainer_activations(sizes, n, library) for n in layers)
    aside = {} if library.checkpoint_every else {"checkpoint copies": parts["variants"] + parts["optimizer"]}
    if not on_gpu:
        return parts | aside, {}
    return {name: size for name, size in parts.items() if name != "start weights"}, {
        "start weights": parts["start weights"]
    } | aside
