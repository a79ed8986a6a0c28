"""A child as it will be published. Its weights are float32 while it trains, and are written in its own dtype, often bfloat16.

Rounding takes small changes away, so what training has gained in float32 says little of what is published: with a learning rate of
1e-5 half of it, and more, can be lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def as_published(parameters: Mapping[str, nn.Parameter], dtype: torch.dtype) -> Iterator[None]:
    """Weights have the values that they are written with in `dtype` while this is open, and their own afterwards.

    It is for the time between two optimizer steps: gradients are lost, for their memory holds the weights meanwhile.
    """
    rounded = {name: parameter for name, parameter in parameters.items() if parameter.dtype != dtype}
    own = {name: _keep(parameter, dtype) for name, parameter in rounded.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in rounded.items():
                parameter.copy_(own[name])


@torch.no_grad()
def _keep(parameter: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
    """A copy of a weight, which is then rounded."""
    own = parameter.detach().clone() if parameter.grad is None else parameter.grad.copy_(parameter)
    parameter.copy_(own.to(dtype))
    return own
