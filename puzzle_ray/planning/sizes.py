"""Parameters of a parent's parts and of its variants, counted on the real classes without allocating them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from puzzle_ray.artifacts import LayerChoice, SearchSpace
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.models.blocks import stack_without_weights, swapped
from puzzle_ray.models.describe import describe
from puzzle_ray.profiling.memory import subblock_weights, weights_of
from puzzle_ray.variants.base import find_variant

FLOAT32_BYTES = 4


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
        self.trainers: dict[tuple[int, int, int], dict[str, int]] = {}  # what is counted of block trainers, see `block_training`
        self.evaluated: dict[tuple[Any, ...], Any] = {}  # what is counted of the evaluation, see `evaluating`

    def distinct(self, runs: Sequence[range]) -> list[range]:
        """One of each sort of equal runs of layers."""
        depth = len(self.layers)
        found = {(tuple(self.kinds[n] for n in run), run.start == 0, run.stop == depth): run for run in runs}
        return list(found.values())

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
