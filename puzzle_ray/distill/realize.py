"""Puts a child together from the parent's checkpoint and a block library, and publishes it. Weights go from file to file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.errors import ParentError
from puzzle_ray.models.blocks import logits_layer_by_layer, swapped
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import quiet_transformers, read_config
from puzzle_ray.models.child_files import StatesOf, write_child
from puzzle_ray.models.describe import describe
from puzzle_ray.store import Artifact

_PROBE_TOKENS = 32


def realize(parent: str, choices: Sequence[LayerChoice], library: Artifact, artifact: Artifact) -> None:
    """Writes the child in the parent's dtype and publishes it as the folder `child` of `artifact`.

    Raises ParentError where the saved child does not give the logits of the parent with these blocks in it, bit for bit.
    """
    from puzzle_ray.distill.library import Library

    folder, states_of = locate(parent), Library(library).states
    config = read_config(folder)
    dtype = getattr(config, "dtype", None) or torch.float32
    with quiet_transformers(), artifact.folder_to_publish("child") as target:
        made = {"assembled": "the parent's weights, and blocks of a library", "library": library.key}
        num_params = write_child(folder, config, choices, states_of, dtype, target, made)
        wanted = _exchanged(folder, config, choices, states_of, dtype)
        if not torch.isfinite(wanted).all():
            problem = f"the child's logits are not finite in {str(dtype).removeprefix('torch.')}, the parent's dtype"
            raise ParentError("parent", problem, "save the parent in bfloat16 or float32")
        if not torch.equal(wanted, _saved(target, dtype)):
            raise ParentError("child", "the saved child does not give the logits it was saved with", "report this as a bug")
    artifact.finish({"num_params": num_params, "dtype": str(dtype).removeprefix("torch.")})


def _probe(config: Any) -> Tensor:
    return torch.arange(_PROBE_TOKENS).remainder(config.vocab_size).unsqueeze(0)


def _exchanged(folder: Path, config: Any, choices: Sequence[LayerChoice], states_of: StatesOf, dtype: torch.dtype) -> Tensor:
    """The logits of the parent with library blocks in place of its own. One layer is in memory at a time."""
    descriptor = describe(config)

    def exchange(layer: nn.Module, index: int) -> nn.Module:
        choice = choices[index]
        return swapped(layer, choice, descriptor, config, states_of(index, choice)) if choice.replaced else layer

    return logits_layer_by_layer(folder, descriptor, config, dtype, _probe(config), exchange=exchange)


def _saved(folder: Path, dtype: torch.dtype) -> Tensor:
    """The logits of the child in a folder, in the same way."""
    config = read_config(folder)
    return logits_layer_by_layer(folder, describe(config), config, dtype, _probe(config))
