"""How far a child's predictions and final hidden states are from the parent's, for each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from puzzle_ray.distill.losses import (
    cosine_distance_per_sequence,
    kl_per_sequence,
    next_token_loss_per_sequence,
    normalised_mse_per_sequence,
)

# B sequences, T tokens, V vocabulary, D hidden


@dataclass(frozen=True)
class PredictionMetrics:
    """Means over the tokens of a sequence, one value per sequence.

    `kl` is KL(parent || child) and `lm_loss` the next-token loss, both in nats per token. `top<k>_agreement` is the share of positions
    where the parent's most probable token is among the child's k most probable. `cosine_distance` (1 - cosine) and `normalised_mse`
    (squared error over the parent's mean square) compare the outputs of the final norm. These two are empty where no hidden states
    were given. `tokens` is the number of tokens of all sequences.
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
    """The standard error of the mean, over sequences; 0 for a single sequence."""
    n = len(values)
    if n < 2:
        return 0.0
    centre = mean(values)
    return float((sum((v - centre) ** 2 for v in values) / (n - 1) / n) ** 0.5)


@torch.no_grad()
def compare_predictions(
    parent_log_probs_BTV: Tensor,
    logits_BTV: Tensor,
    input_ids_BT: Tensor,
    parent_hidden_BTD: Tensor | None = None,
    hidden_BTD: Tensor | None = None,
) -> PredictionMetrics:
    """Compares a child's logits with the parent's log-probabilities, and their hidden states where these are given.

    `parent_log_probs_BTV` is the parent's log-softmax in float32. `logits_BTV` may have any dtype; all measures are computed in
    float32. The hidden states are outputs of the final norm.
    """
    logits = logits_BTV.float()
    child_log_probs = F.log_softmax(logits, dim=-1)
    kl = kl_per_sequence(parent_log_probs_BTV, child_log_probs)
    loss = next_token_loss_per_sequence(child_log_probs, input_ids_BT)
    parents_best = logits.gather(-1, parent_log_probs_BTV.argmax(-1, keepdim=True))
    better = (logits > parents_best).sum(-1)  # tokens that the child ranks above the parent's best one
    top1, top5, top10 = (tuple((better < k).float().mean(-1).tolist()) for k in (1, 5, 10))
    cosine: tuple[float, ...] = ()
    mse: tuple[float, ...] = ()
    if parent_hidden_BTD is not None and hidden_BTD is not None:
        parent, child = parent_hidden_BTD.float(), hidden_BTD.float()
        cosine = tuple(cosine_distance_per_sequence(child, parent).tolist())
        mse = tuple(normalised_mse_per_sequence(child, parent).tolist())
    return PredictionMetrics(tuple(kl.tolist()), tuple(loss.tolist()), top1, top5, top10, int(input_ids_BT.numel()), cosine, mse)
