"""Activation checkpointing: layers keep only their inputs, and are run again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from puzzle_ray.models.describe import describe


def layers_of(model: Any) -> Iterator[nn.Module]:
    layers: nn.Module = model.get_submodule(describe(model.config).layers)
    return layers.children()


def recompute_layers(model: Any) -> None:
    """From now on every layer of `model` keeps only its input: less memory for a third more work, and the same bits."""
    for layer in layers_of(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
