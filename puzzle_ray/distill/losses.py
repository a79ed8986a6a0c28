"""What a block variant minimises in local distillation. All terms are computed in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from puzzle_ray.artifacts import SubblockKind
from puzzle_ray.distill.settings import BlockLoss


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


NO_LABEL = -100


_CHUNK_ELEMENTS = 1 << 22  # logits turned into fp32 at a time


class _TokenLosses(torch.autograd.Function):
    """KL(parent || child) and next-token loss; their gradient, softmax(child) - target, is written in the same pass."""

    @staticmethod
    def forward(
        ctx: Any, child_logits: Tensor, parent_logits: Tensor, labels: Tensor, kl_weight: float, lm_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, vocab_size = child_logits.shape
        labelled = max(1, int((labels != NO_LABEL).sum()))
        gradient = torch.empty_like(child_logits)
        kl, lm = torch.zeros(2, dtype=torch.float32, device=child_logits.device)
        size = max(1, _CHUNK_ELEMENTS // vocab_size)
        for start in range(0, tokens, size):
            chunk = slice(start, start + size)
            child = child_logits[chunk].float().log_softmax(-1)
            parent = parent_logits[chunk].float().log_softmax(-1)
            known = (labels[chunk] != NO_LABEL).float().unsqueeze(1)
            label = labels[chunk].clamp(min=0).unsqueeze(1)
            lm -= (child.gather(1, label) * known).sum() / labelled
            target = parent.exp()
            kl += (target * parent.sub_(child)).sum() / tokens
            child.exp_()
            slope = (child - target).mul_(kl_weight / tokens)
            if lm_weight:
                known *= lm_weight / labelled
                slope.addcmul_(child, known).scatter_add_(1, label, -known)
            gradient[chunk] = slope
        ctx.gradient = gradient
        ctx.mark_non_differentiable(kl, lm)
        return kl_weight * kl + lm_weight * lm, kl, lm

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient.mul_(outer[0]), None, None, None, None


def token_losses(
    child_logits: Tensor, parent_logits: Tensor, input_ids: Tensor, kl_weight: float, lm_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(weighted sum, KL, next-token loss) in nats, fp32; logits `[batch, tokens, vocab_size]`, ids `[batch, tokens]`.

    KL(parent || child) is a mean over all tokens, the next-token loss over those that have a next one. Only the sum has
    a gradient, only towards the child. Memory beside the logits: one tensor of their size and dtype, a chunk in fp32.
    """
    labels = functional.pad(input_ids[:, 1:], (0, 1), value=NO_LABEL).flatten()
    flat = child_logits.flatten(0, 1), parent_logits.detach().flatten(0, 1)
    total, kl, lm = _TokenLosses.apply(*flat, labels, kl_weight, lm_weight)
    return total, kl, lm


def cosine_distance(child: Sequence[Tensor], parent: Sequence[Tensor]) -> Tensor:
    """Mean over layers and tokens of 1 - cos(child, parent); entries are outputs `[batch, tokens, hidden_size]`."""
    pairs = zip(child, parent, strict=True)
    similarity = [functional.cosine_similarity(c.float(), p.detach().float(), dim=-1).mean() for c, p in pairs]
    return 1 - torch.stack(similarity).mean()
