"""The losses of both distillations, and the same measures per sequence for scoring. All are computed in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def next_labels(input_ids: Tensor) -> Tensor:
    """The next token of every position, `[batch, tokens]`; NO_LABEL where there is none."""
    return functional.pad(input_ids[:, 1:], (0, 1), value=NO_LABEL)


def cosine_distance(child: Sequence[Tensor], parent: Sequence[Tensor]) -> Tensor:
    """Mean over layers and tokens of 1 - cos(child, parent). Entries are layer outputs, `[batch, tokens, hidden_size]`."""
    pairs = zip(child, parent, strict=True)
    similarity = [functional.cosine_similarity(c.float(), p.detach().float(), dim=-1).mean() for c, p in pairs]
    return 1 - torch.stack(similarity).mean()


# B sequences, T tokens, V vocabulary, D hidden size


def kl_per_token(parent_log_probs: Tensor, child_log_probs: Tensor) -> Tensor:
    """KL(parent || child) in nats, `[..., vocab_size]` -> `[...]`. Both inputs are float32 log-probabilities."""
    return parent_log_probs.exp().mul_(parent_log_probs - child_log_probs).sum(-1)


def kl_per_sequence(parent_log_probs_BTV: Tensor, child_log_probs_BTV: Tensor) -> Tensor:
    """The same as a mean over tokens: `[sequences]`."""
    return kl_per_token(parent_log_probs_BTV, child_log_probs_BTV).mean(-1)


def next_token_loss_per_sequence(log_probs_BTV: Tensor, input_ids_BT: Tensor) -> Tensor:
    """Next-token loss in nats, a mean over positions 0 .. T-2: `[sequences]`."""
    return -log_probs_BTV[:, :-1].gather(-1, input_ids_BT[:, 1:].unsqueeze(-1)).squeeze(-1).mean(-1)


def cosine_distance_per_sequence(child_BTD: Tensor, parent_BTD: Tensor) -> Tensor:
    """1 - cos(parent, child), a mean over tokens: `[sequences]`. Both inputs are float32."""
    return (1 - functional.cosine_similarity(parent_BTD, child_BTD, dim=-1)).mean(-1)


def normalised_mse_per_sequence(child_BTD: Tensor, parent_BTD: Tensor) -> Tensor:
    """Squared error over the parent's mean square: `[sequences]`. Both inputs are float32."""
    return (child_BTD - parent_BTD).square().mean((1, 2)) / parent_BTD.square().mean((1, 2)).clamp_min(1e-30)
