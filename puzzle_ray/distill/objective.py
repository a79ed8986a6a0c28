"""What a block variant minimises in local distillation. All terms are computed in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle_ray.artifacts import SubblockKind
from puzzle_ray.config import BlockLoss
from puzzle_ray.distill.gkd import cosine_distance


def normalised_mse(child: Tensor, parent: Tensor) -> Tensor:
    """MSE(parent, child) / MSE(parent, 0), in fp32: 0 is a perfect copy, 1 no better than zeros (paper, section 3.2)."""
    target = parent.float()
    return (child.float() - target).square().mean() / target.square().mean().clamp_min(1e-30)


@dataclass(frozen=True)
class LayerPass:
    """What enters a layer, what leaves its attention half, and what leaves it; each `[batch, tokens, hidden_size]`."""

    start: Tensor
    middle: Tensor
    end: Tensor

    def added(self, kind: SubblockKind) -> Tensor:
        """What a subblock adds to the residual."""
        if kind == "attention":
            return self.middle.float() - self.start.float()
        return self.end.float() - self.middle.float()


def block_loss(child: LayerPass, parent: LayerPass) -> Tensor:
    """Normalised MSE of what leaves the layer: what variants are validated by, whatever they are trained on."""
    return normalised_mse(child.end, parent.end)


def training_loss(weights: BlockLoss, replaced: Sequence[SubblockKind], child: LayerPass, parent: LayerPass) -> Tensor:
    """The weighted sum of the terms that `BlockLoss` names; `subblock` is the mean over the replaced subblocks."""
    terms = []
    if weights.block:
        terms.append(weights.block * block_loss(child, parent))
    if weights.subblock:
        found = [normalised_mse(child.added(kind), parent.added(kind)) for kind in replaced]
        terms.append(weights.subblock * torch.stack(found).mean())
    if weights.cosine:
        terms.append(weights.cosine * cosine_distance([child.end], [parent.end]))
    return torch.stack(terms).sum()
