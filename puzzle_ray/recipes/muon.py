"""The optimizer of the tiny parent's matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Muon:
    """Muon (Jordan et al. 2024): momentum, with every update made nearly orthogonal by five Newton-Schulz steps, in fp32."""

    def __init__(self, matrices: Sequence[Tensor], weight_decay: float, momentum: float = 0.95) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        self.groups = [(group, torch.zeros(len(group), *shape)) for shape, group in by_shape.items()]
        self.weight_decay, self.momentum = weight_decay, momentum

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Updates the matrices by their gradients, and clears these."""
        for matrices, average in self.groups:  # average [N, rows, columns]
            gradient = torch.stack([matrix.grad for matrix in matrices if matrix.grad is not None])
            average.lerp_(gradient, 1 - self.momentum)
            update = gradient.lerp(average, self.momentum)
            tall = update.shape[1] > update.shape[2]
            x = update.mT if tall else update
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                gram = x @ x.mT
                x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
            size = learning_rate * max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            for matrix, direction in zip(matrices, x.mT if tall else x, strict=True):
                matrix.mul_(1 - learning_rate * self.weight_decay).add_(direction, alpha=-size)
                matrix.grad = None
