"""How far a child's predictions and final hidden states are from the parent's, per sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

# B sequences, T tokens, V vocabulary, D hidden


@dataclass(frozen=True)
class PredictionMetrics:
    """Per-sequence means, `[sequences]` each.

    `kl`, `lm_loss`: KL(parent || child) and next-token loss, in nats a token. `top<k>_agreement`: share of positions where the parent's
    most probable token is among the child's k most probable. `cosine_distance` (1 - cosine) and `normalised_mse` (squared error over
    the parent's mean square) compare what the final norm puts out; they are empty where hidden states were not given.
    """

    kl: tuple[float, ...]
    lm_loss: tuple[float, ...]
    top1_agreement: tuple[float, ...]
    top5_agreement: tuple[float, ...]
    top10_agreement: tuple[float, ...]
    tokens: int
    cosine_distance: tuple[float, ...] = ()
    normalised_mse: tuple[float, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[PredictionMetrics]) -> PredictionMetrics:
        """Several batches as one, in order."""
        names = [f.name for f in fields(cls) if f.name != "tokens"]
        values = {name: tuple(v for part in parts for v in getattr(part, name)) for name in names}
        return cls(tokens=sum(part.tokens for part in parts), **values)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean, over sequences; 0 for a single one."""
    n = len(values)
    if n < 2:
        return 0.0
    centre = mean(values)
    return float((sum((v - centre) ** 2 for v in values) / (n - 1) / n) ** 0.5)


def next_token_loss(log_probs_BTV: Tensor, input_ids_BT: Tensor) -> Tensor:
    """[sequences]; reads positions 0 .. T-2."""
    return -log_probs_BTV[:, :-1].gather(-1, input_ids_BT[:, 1:].unsqueeze(-1)).squeeze(-1).mean(-1)


@torch.no_grad()
def compare(
    parent_log_probs_BTV: Tensor,
    logits_BTV: Tensor,
    input_ids_BT: Tensor,
    parent_hidden_BTD: Tensor | None = None,
    hidden_BTD: Tensor | None = None,
) -> PredictionMetrics:
    """`parent_log_probs_BTV` are fp32 log-softmax values; the hidden states are those behind the final norm."""
    logits = logits_BTV.float()
    child_log_probs = F.log_softmax(logits, dim=-1)
    kl = (parent_log_probs_BTV.exp() * (parent_log_probs_BTV - child_log_probs)).sum(-1).mean(-1)
    loss = next_token_loss(child_log_probs, input_ids_BT)
    parents_best = logits.gather(-1, parent_log_probs_BTV.argmax(-1, keepdim=True))
    better = (logits > parents_best).sum(-1)  # tokens that the child puts before the parent's best
    top1, top5, top10 = (tuple((better < k).float().mean(-1).tolist()) for k in (1, 5, 10))
    cosine: tuple[float, ...] = ()
    mse: tuple[float, ...] = ()
    if parent_hidden_BTD is not None and hidden_BTD is not None:
        parent, child = parent_hidden_BTD.float(), hidden_BTD.float()
        cosine = tuple((1 - F.cosine_similarity(parent, child, dim=-1)).mean(-1).tolist())
        mse = tuple(((child - parent).square().mean((1, 2)) / parent.square().mean((1, 2)).clamp_min(1e-30)).tolist())
    return PredictionMetrics(tuple(kl.tolist()), tuple(loss.tolist()), top1, top5, top10, int(input_ids_BT.numel()), cosine, mse)
