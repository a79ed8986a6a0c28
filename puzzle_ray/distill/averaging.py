"""The running average of a child's weights: in place of a falling learning rate, it takes the noise of single steps out of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

POWER = 3


class RunningAverage:
    """An average of the weights after every step so far. The first n steps count n to the power `POWER` together.

    So seven eighths of it are of the last half of the steps, whenever one looks: nothing needs to be known of how long training
    goes on.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.weights: dict[str, Tensor] = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def add(self, steps: int) -> None:
        """The weights are those after so many steps."""
        share = 1 - (1 - 1 / steps) ** POWER
        for name, parameter in self.parameters.items():
            self.weights[name].lerp_(parameter, share)

    @torch.no_grad()
    def restart(self) -> None:
        """From the weights that the child has now."""
        for name, parameter in self.parameters.items():
            self.weights[name].copy_(parameter)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The child has the average while this is open, and its own weights afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            own = parameter.detach().clone()
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(own)

    @torch.no_grad()
    def put(self) -> None:
        """The child gets the average for good."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.weights[name])
