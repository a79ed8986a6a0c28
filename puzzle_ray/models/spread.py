"""A whole model laid out over several devices of one process: what no single GPU holds is evaluated on several."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from puzzle_ray.models.child import load_model
from puzzle_ray.models.describe import describe


def load_on(folder: str | Path, dtype: torch.dtype | None, devices: Sequence[torch.device]) -> Any:
    """The causal LM of a folder, on one device or spread over several. Raises ParentError as `load_model` does."""
    model = load_model(folder, dtype)
    return model.to(devices[0]) if len(devices) == 1 else spread(model, devices)


def spread(model: Any, devices: Sequence[torch.device]) -> Any:
    """Moves consecutive runs of layers to the devices, of about equal bytes, and all that is in no layer to the first one.

    So ids go in and final states and logits come out on `model.device`, as with one device. A layer fetches what it is given.
    """
    descriptor = describe(model.config)
    where, _, name = descriptor.layers.rpartition(".")
    holder, layers = model.get_submodule(where), model.get_submodule(descriptor.layers)
    setattr(holder, name, nn.ModuleList())
    model.to(devices[0])
    setattr(holder, name, layers)
    sizes = [_bytes(layer) for layer in layers]
    for layer, device in zip(layers, _places(_bytes(model) - sum(sizes), sizes, devices), strict=True):
        layer.to(device)
        layer.register_forward_pre_hook(partial(_fetch, device), with_kwargs=True)
    model.get_submodule(descriptor.final_norm).register_forward_pre_hook(partial(_fetch, devices[0]), with_kwargs=True)
    return model


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _places(before: int, sizes: Sequence[int], devices: Sequence[torch.device]) -> list[torch.device]:
    """The device of each layer; `before` are bytes that the first device has anyway."""
    share, held, places = (before + sum(sizes)) / len(devices), float(before), []
    for size in sizes:
        places.append(devices[min(len(devices) - 1, int((held + size / 2) / max(share, 1)))])
        held += size
    return places


def _fetch(device: torch.device, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return _moved(args, device), _moved(kwargs, device)


def _moved(given: Any, device: torch.device) -> Any:
    """With all tensors on a device; of caches, every layer's part is where the layer is."""
    if isinstance(given, Tensor):
        return given.to(device)
    if type(given) in (tuple, list):
        return type(given)(_moved(each, device) for each in given)
    if type(given) is dict:
        return {name: _moved(each, device) for name, each in given.items()}
    return given
