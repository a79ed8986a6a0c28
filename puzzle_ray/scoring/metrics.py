"""How far a child's predictions are from the parent's, per sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# B sequences, T tokens, V vocabulary


@dataclass(frozen=True)
class PredictionMetrics:
    """Per-sequence means, `[sequences]` each: KL(parent || child) and next-token loss in nats, share of equal top-1 predictions."""

    kl: tuple[float, ...]
    lm_loss: tuple[float, ...]
    top1_agreement: tuple[float, ...]
    tokens: int

    @classmethod
    def joined(cls, parts: list[PredictionMetrics]) -> PredictionMetrics:
        """Several batches as one, in order."""
        return cls(
            tuple(v for p in parts for v in p.kl),
            tuple(v for p in parts for v in p.lm_loss),
            tuple(v for p in parts for v in p.top1_agreement),
            sum(p.tokens for p in parts),
        )


def mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def standard_error(values: tuple[float, ...]) -> float:
    """Of the mean, over sequences; 0 for a single one."""
    n = len(values)
    if n < 2:
        return 0.0
    centre = mean(values)
    return float((sum((v - centre) ** 2 for v in values) / (n - 1) / n) ** 0.5)


@torch.no_grad()
def compare(parent_log_probs_BTV: Tensor, logits_BTV: Tensor, input_ids_BT: Tensor) -> PredictionMetrics:
    """`parent_log_probs_BTV` are fp32 log-softmax values; the next-token loss reads positions 0 .. T-2."""
    child_log_probs = F.log_softmax(logits_BTV.float(), dim=-1)
    kl = (parent_log_probs_BTV.exp() * (parent_log_probs_BTV - child_log_probs)).sum(-1).mean(-1)
    targets = input_ids_BT[:, 1:].unsqueeze(-1)
    loss = -child_log_probs[:, :-1].gather(-1, targets).squeeze(-1).mean(-1)
    agreement = (parent_log_probs_BTV.argmax(-1) == child_log_probs.argmax(-1)).float().mean(-1)
    return PredictionMetrics(tuple(kl.tolist()), tuple(loss.tolist()), tuple(agreement.tolist()), int(input_ids_BT.numel()))
