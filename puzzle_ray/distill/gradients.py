"""The gradients of one optimizer step: summed over micro-batches and processes, whole in every process or a part in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

AllReduce = Callable[[Tensor], None]  # sums a tensor over all processes, in place


class Gradients(Protocol):
    """What a step does with gradients. A step takes `count` micro-batches over all processes."""

    def start(self) -> None:
        """All of them are 0."""

    def add(self, losses: Tensor) -> None:
        """The four losses of a micro-batch, whose backward pass is done."""

    def finish(self) -> tuple[float, list[float]]:
        """Makes means over micro-batches of them. Returns their norm, and the means of the losses; both the same in all processes."""

    def scale(self, factor: float) -> None: ...


class FlatGradients:
    """All gradients are views of one buffer. Its last four elements are the losses. So a step needs one all-reduce and one norm."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], count: int, device: torch.device, all_reduce: AllReduce | None
    ) -> None:
        self.count, self.all_reduce = count, all_reduce
        self.sums = torch.zeros(sum(p.numel() for p in parameters.values()) + 4, device=device)
        self.flat, self.losses = self.sums[:-4], self.sums[-4:]
        start = 0
        for parameter in parameters.values():
            parameter.grad = self.flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def start(self) -> None:
        self.sums.zero_()

    def add(self, losses: Tensor) -> None:
        self.losses += losses

    def finish(self) -> tuple[float, list[float]]:
        if self.all_reduce is not None:
            self.all_reduce(self.sums)
        self.sums /= self.count
        return float(torch.linalg.vector_norm(self.flat)), self.losses.tolist()

    def scale(self, factor: float) -> None:
        self.flat *= factor


class ShardedGradients:
    """Each of `processes` has its shard of every gradient. FSDP has made means over processes of them."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], count: int, device: torch.device, all_reduce: AllReduce, processes: int
    ) -> None:
        self.parameters, self.count, self.all_reduce = tuple(parameters.values()), count, all_reduce
        self.share = processes / count
        self.losses = torch.zeros(4, device=device)

    def start(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        self.losses.zero_()

    def add(self, losses: Tensor) -> None:
        self.losses += losses

    def finish(self) -> tuple[float, list[float]]:
        for parameter in self.parameters:
            if parameter.grad is None:  # nothing reached it; AdamW goes on all the same
                parameter.grad = torch.zeros_like(parameter)
        if self.share != 1:
            self.scale(self.share)
        norm = torch.nn.utils.get_total_norm(self._local()).to(self.losses.device)
        totals = torch.cat([self.losses.double(), norm.double().square().reshape(1)])
        self.all_reduce(totals)
        *losses, square = totals.tolist()
        return square**0.5, [loss / self.count for loss in losses]

    def scale(self, factor: float) -> None:
        for gradient in self._local():
            gradient *= factor

    def _local(self) -> list[Tensor]:
        gradients: list[Any] = [parameter.grad for parameter in self.parameters]
        return [gradient.to_local() for gradient in gradients]
