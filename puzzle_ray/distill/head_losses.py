"""The losses of global distillation from hidden states and heads: whole logits exist neither of the child nor of the parent.

Logits are the largest tensors of a step: 2,048 tokens of a vocabulary of 150,000 take 1.2 GiB in float32, for each model and once more
for the gradient. Here they are computed for a few tokens at a time, and their gradient is carried to the hidden states and to the
head's weights before the next tokens. Sums are in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from puzzle_ray.distill.losses import NO_LABEL
from puzzle_ray.models.head import CHUNK_ELEMENTS, Head
from puzzle_ray.process import LITTLE, give_back_freed_memory

# N tokens of all sequences, V vocabulary, D hidden size


@dataclass(frozen=True)
class _Weights:
    kl: float
    lm: float
    temperature: float


def _logit_slopes(
    child_NV: Tensor, parent_NV: Tensor, labels_N: Tensor, tokens: int, labelled: int, weights: _Weights
) -> tuple[Tensor, Tensor, Tensor]:
    """(KL, next-token loss, slope of their weighted sum at the child's logits), all in float32.

    KL(parent || child) is divided by `tokens`, the next-token loss by `labelled`: the shares of these tokens in means over all.
    """
    child, temperature = child_NV.float().log_softmax(-1), weights.temperature
    known = (labels_N != NO_LABEL).float().unsqueeze(1)
    label = labels_N.clamp(min=0).unsqueeze(1)
    lm = -((child.gather(1, label) * known).sum() / labelled)
    if temperature == 1.0:
        soft, parent = child, parent_NV.float().log_softmax(-1)
    else:
        soft, parent = ((logits.float() / temperature).log_softmax(-1) for logits in (child_NV, parent_NV))
        child = child.exp_()
    target = parent.exp()
    kl = (target * parent.sub_(soft)).sum() * temperature**2 / tokens
    soft.exp_()
    slope = (soft - target).mul_(weights.kl * temperature / tokens)
    if weights.lm:
        known *= weights.lm / labelled
        slope.addcmul_(child, known).scatter_add_(1, label, -known)
    return kl, lm, slope


class _HeadLosses(torch.autograd.Function):
    """The weighted sum of both losses. The same pass computes its gradients: at the child's hidden states, and at its head's weights."""

    @staticmethod
    def forward(
        ctx: Any, final_ND: Tensor, child: Head, parent: Head, parent_ND: Tensor, labels_N: Tensor,
        terms: _Weights, *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        tokens = len(final_ND)
        labelled = max(1, int((labels_N != NO_LABEL).sum()))
        gradient = torch.empty_like(final_ND)
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        kl, lm = torch.zeros(2, dtype=torch.float32, device=final_ND.device)
        for part, parent_NV in parent.chunks(parent_ND.unsqueeze(0)):
            with torch.enable_grad():
                hidden = final_ND[part].detach().requires_grad_()
                logits = child.logits(hidden)
            own_kl, own_lm, slope = _logit_slopes(logits.detach(), parent_NV, labels_N[part], tokens, labelled, terms)
            kl += own_kl
            lm += own_lm
            if weights:
                give_back_freed_memory(LITTLE)  # a gradient as large as the head comes now
            at_hidden, *at_weights = torch.autograd.grad(logits, (hidden, *weights), slope.to(logits.dtype))
            gradient[part] = at_hidden
            for total in reversed(sums):
                total += at_weights.pop()  # gone before the next tokens' is made: it is as large as the head
        ctx.gradients = (gradient, *sums)
        ctx.mark_non_differentiable(kl, lm)
        return terms.kl * kl + terms.lm * lm, kl, lm

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradient, *sums = (each.mul_(outer[0]) for each in ctx.gradients)
        ctx.gradients = ()  # so that what a tied embedding adds is added in place
        return gradient, *[None] * 5, *sums


def head_losses(
    child: Head, final_BTD: Tensor, parent: Head, parent_BTD: Tensor, labels_BT: Tensor,
    kl_weight: float, lm_weight: float, temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(weighted sum, KL, next-token loss), in nats and float32, from outputs of both models' final norms.

    Labels are as of `next_labels`. KL(parent || child) is a mean over all tokens. At a `temperature` both distributions are softened by
    it, and the KL is multiplied by its square (Hinton et al. 2015), so that its gradient keeps its size. The next-token loss is a mean
    over the tokens that have a label. Only the weighted sum has a gradient, towards the child's hidden states and those weights of its
    head that require one.
    """
    weights = [weight for weight in child.linear.parameters() if weight.requires_grad]
    terms = _Weights(kl_weight, lm_weight, temperature)
    states = final_BTD.flatten(0, 1), child, parent, parent_BTD.detach().flatten(0, 1)
    total, kl, lm = _HeadLosses.apply(*states, labels_BT.flatten(), terms, *weights)
    return total, kl, lm


@torch.no_grad()
def label_log_probs(head: Head, final_BTD: Tensor, labels_BT: Tensor) -> Tensor:
    """The log-probability of every label, `[batch, tokens]` in float32; of token 0 where there is no label."""
    wanted = labels_BT.clamp(min=0).flatten().unsqueeze(1)
    found = [logits_NV.float().log_softmax(-1).gather(1, wanted[part]) for part, logits_NV in head.chunks(final_BTD)]
    return torch.cat(found).view(labels_BT.shape)


class _MeanCosine(torch.autograd.Function):
    """The mean over tokens of the cosine similarity, in float32. Float32 copies exist of a few tokens at a time, both ways."""

    @staticmethod
    def forward(ctx: Any, child_BTD: Tensor, parent_BTD: Tensor) -> Tensor:
        ctx.save_for_backward(child_BTD, parent_BTD)
        child, parent = child_BTD.flatten(0, 1), parent_BTD.flatten(0, 1)
        parts = [functional.cosine_similarity(child[p].float(), parent[p].float(), dim=-1) for p in _runs(child)]
        return torch.cat(parts).view(child_BTD.shape[:2]).mean()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        child_BTD, parent_BTD = ctx.saved_tensors
        child, parent = child_BTD.flatten(0, 1), parent_BTD.flatten(0, 1)
        gradient = torch.empty_like(child)
        for part in _runs(child):
            with torch.enable_grad():
                own = child[part].detach().requires_grad_()
                similarity = functional.cosine_similarity(own.float(), parent[part].float(), dim=-1)
            (gradient[part],) = torch.autograd.grad(similarity, own, (outer[0] / len(child)).expand_as(similarity))
        return gradient.view_as(child_BTD), None


def _runs(tokens_ND: Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS.get(tokens_ND.device.type, CHUNK_ELEMENTS["cuda"]) // tokens_ND.shape[1])
    return [slice(start, start + size) for start in range(0, len(tokens_ND), size)]


def layers_cosine_distances(child: Sequence[Tensor], parent: Sequence[Tensor]) -> Tensor:
    """1 - cos(child, parent) of every layer, a mean over tokens: `[layers]`. Entries are layer outputs, `[batch, tokens, hidden_size]`."""
    return 1 - torch.stack([_MeanCosine.apply(c, p.detach()) for c, p in zip(child, parent, strict=True)])


def layers_cosine_distance(child: Sequence[Tensor], parent: Sequence[Tensor]) -> Tensor:
    """Mean over layers and tokens of 1 - cos(child, parent)."""
    similarity = [_MeanCosine.apply(c, p.detach()) for c, p in zip(child, parent, strict=True)]
    return 1 - torch.stack(similarity).mean()
