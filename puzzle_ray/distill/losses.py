"""The losses of both distillations, and the same measures per sequence for scoring. All are computed in float32."""

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
    """MSE(parent, child) / MSE(parent, 0), in float32. 0 is a perfect copy; 1 is no better than zeros. (Paper v5, section 3.2.)

    Both are of the same shape, in any dtype.
    """
    target = parent.float()
    return (child.float() - target).square().mean() / target.square().mean().clamp_min(1e-30)


@dataclass(frozen=True)
class LayerPass:
    """The hidden states of one layer, each `[batch, tokens, hidden_size]`.

    `start` enters the layer, `middle` leaves its attention half, and `end` leaves the layer.
    """

    start: Tensor
    middle: Tensor
    end: Tensor

    def added(self, kind: SubblockKind) -> Tensor:
        """What a subblock adds to the residual stream, in float32."""
        if kind == "attention":
            return self.middle.float() - self.start.float()
        return self.end.float() - self.middle.float()


def block_loss(child: LayerPass, parent: LayerPass) -> Tensor:
    """Normalised MSE of the layer's output. Every variant is validated by it, whatever loss it is trained on."""
    return normalised_mse(child.end, parent.end)


def training_loss(weights: BlockLoss, replaced: Sequence[SubblockKind], child: LayerPass, parent: LayerPass) -> Tensor:
    """The weighted sum of the terms of `BlockLoss`. Its term `subblock` is a mean over the `replaced` subblocks."""
    terms = []
    if weights.block:
        terms.append(weights.block * block_loss(child, parent))
    if weights.subblock:
        errors = [normalised_mse(child.added(kind), parent.added(kind)) for kind in replaced]
        terms.append(weights.subblock * torch.stack(errors).mean())
    if weights.cosine:
        terms.append(weights.cosine * cosine_distance([child.end], [parent.end]))
    return torch.stack(terms).sum()


NO_LABEL = -100  # marks a token that has no next one
_CHUNK_ELEMENTS = 1 << 22  # logits that are turned into float32 at a time


class _TokenLosses(torch.autograd.Function):
    """KL(parent || child) and next-token loss. The same pass writes their gradient, softmax(child) - target."""

    @staticmethod
    def forward(
        ctx: Any,
        child_logits: Tensor,
        parent_logits: Tensor,
        labels: Tensor,
        kl_weight: float,
        lm_weight: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, vocab_size = child_logits.shape
        labelled = max(1, int((labels != NO_LABEL).sum()))
        gradient = torch.empty_like(child_logits)
        kl, lm = torch.zeros(2, dtype=torch.float32, device=child_logits.device)
        size = max(1, _CHUNK_ELEMENTS // vocab_size)
        for start in range(0, tokens, size):
            chunk = slice(start, start + size)
            child = child_logits[chunk].float().log_softmax(-1)
            known = (labels[chunk] != NO_LABEL).float().unsqueeze(1)
            label = labels[chunk].clamp(min=0).unsqueeze(1)
            lm -= (child.gather(1, label) * known).sum() / labelled
            if temperature == 1.0:
                soft, parent = child, parent_logits[chunk].float().log_softmax(-1)
            else:
                soft, parent = ((x[chunk].float() / temperature).log_softmax(-1) for x in (child_logits, parent_logits))
                child = child.exp_()
            target = parent.exp()
            kl += (target * parent.sub_(soft)).sum() * temperature**2 / tokens
            soft.exp_()
            slope = (soft - target).mul_(kl_weight * temperature / tokens)
            if lm_weight:
                known *= lm_weight / labelled
                slope.addcmul_(child, known).scatter_add_(1, label, -known)
            gradient[chunk] = slope
        ctx.gradient = gradient
        ctx.mark_non_differentiable(kl, lm)
        return kl_weight * kl + lm_weight * lm, kl, lm

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient.mul_(outer[0]), None, None, None, None, None


def next_labels(input_ids: Tensor) -> Tensor:
    """The next token of every position, `[batch, tokens]`; NO_LABEL where there is none."""
    return functional.pad(input_ids[:, 1:], (0, 1), value=NO_LABEL)


def token_losses(
    child_logits: Tensor,
    parent_logits: Tensor,
    labels: Tensor,
    kl_weight: float,
    lm_weight: float,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(weighted sum, KL, next-token loss), in nats and float32.

    Logits are `[batch, tokens, vocab_size]` in any dtype, labels are `[batch, tokens]` as of `next_labels`. KL(parent || child) is a mean
    over all tokens. At a `temperature` both distributions are softened by it, and the KL is multiplied by its square (Hinton et al.
    2015), so that its gradient keeps its size. The next-token loss is a mean over the tokens that have a label. Only the weighted sum
    has a gradient, and only towards the child. Besides the logits this needs memory for one tensor of their size and dtype, and for a
    chunk in float32.
    """
    flat = child_logits.flatten(0, 1), parent_logits.detach().flatten(0, 1)
    total, kl, lm = _TokenLosses.apply(*flat, labels.flatten(), kl_weight, lm_weight, temperature)
    return total, kl, lm


def label_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """The log-probability of every label, `[batch, tokens]` in float32; of token 0 where there is no label."""
    flat, wanted = logits.flatten(0, 1), labels.clamp(min=0).flatten().unsqueeze(1)
    size = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    starts = range(0, len(flat), size)
    found = [flat[i : i + size].float().log_softmax(-1).gather(1, wanted[i : i + size]) for i in starts]
    return torch.cat(found).view(labels.shape)


def cosine_distances(child: Sequence[Tensor], parent: Sequence[Tensor]) -> Tensor:
    """1 - cos(child, parent) of every layer, a mean over tokens: `[layers]`. Entries are layer outputs, `[batch, tokens, hidden_size]`."""
    pairs = zip(child, parent, strict=True)
    return torch.stack([1 - functional.cosine_similarity(c.float(), p.detach().float(), dim=-1).mean() for c, p in pairs])


def cosine_distance(child: Sequence[Tensor], parent: Sequence[Tensor]) -> Tensor:
    """Mean over layers and tokens of 1 - cos(child, parent). Entries are layer outputs, `[batch, tokens, hidden_size]`."""
    pairs = zip(child, parent, strict=True)
    similarity = [functional.cosine_similarity(c.float(), p.detach().float(), dim=-1).mean() for c, p in pairs]
    return 1 - torch.stack(similarity).mean()


# B sequences, T tokens, V vocabulary, D hidden size


def kl_per_sequence(parent_log_probs_BTV: Tensor, child_log_probs_BTV: Tensor) -> Tensor:
    """KL(parent || child) in nats, a mean over tokens: `[sequences]`. Both inputs are float32 log-probabilities."""
    return (parent_log_probs_BTV.exp() * (parent_log_probs_BTV - child_log_probs_BTV)).sum(-1).mean(-1)


def next_token_loss_per_sequence(log_probs_BTV: Tensor, input_ids_BT: Tensor) -> Tensor:
    """Next-token loss in nats, a mean over positions 0 .. T-2: `[sequences]`."""
    return -log_probs_BTV[:, :-1].gather(-1, input_ids_BT[:, 1:].unsqueeze(-1)).squeeze(-1).mean(-1)


def cosine_distance_per_sequence(child_BTD: Tensor, parent_BTD: Tensor) -> Tensor:
    """1 - cos(parent, child), a mean over tokens: `[sequences]`. Both inputs are float32."""
    return (1 - functional.cosine_similarity(parent_BTD, child_BTD, dim=-1)).mean(-1)


def normalised_mse_per_sequence(child_BTD: Tensor, parent_BTD: Tensor) -> Tensor:
    """Squared error over the parent's mean square: `[sequences]`. Both inputs are float32."""
    return (child_BTD - parent_BTD).square().mean((1, 2)) / parent_BTD.square().mean((1, 2)).clamp_min(1e-30)
