"""How far a child's predictions and final hidden states are from the parent's, for each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from puzzle_ray.distill.losses import cosine_distance_per_sequence, kl_per_token, normalised_mse_per_sequence
from puzzle_ray.models.head import Head
from puzzle_ray.process import nothing_large_kept

# B sequences, T tokens, N tokens of all sequences, V vocabulary, D hidden


@dataclass(frozen=True)
class PredictionMetrics:
    """Means over the tokens of a sequence, one value per sequence.

    `kl` is KL(parent || child) and `lm_loss` the next-token loss, both in nats per token. `top<k>_agreement` is the share of positions
    where the parent's most probable token is among the child's k most probable; of equally probable ones (in 16 bits one position in fifty
    has such) the first is taken, as greedy decoding does. `cosine_distance` (1 - cosine) and `normalised_mse`
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
    whole = parent_log_probs_BTV.flatten(0, 1), logits_BTV.flatten(0, 1)
    return _metrics_of([_token_measures(*whole, next_ids(input_ids_BT))], input_ids_BT, parent_hidden_BTD, hidden_BTD)


@torch.no_grad()
def compare_with_parent(
    parent_log_probs_BTV: Tensor, child: Head, input_ids_BT: Tensor, parent_hidden_BTD: Tensor, hidden_BTD: Tensor
) -> PredictionMetrics:
    """The same from the child's final hidden states and its head: its logits exist for a few tokens at a time."""
    log_probs_NV, ids_N = parent_log_probs_BTV.flatten(0, 1), next_ids(input_ids_BT)
    parts = [_token_measures(log_probs_NV[part], logits, ids_N[part]) for part, logits in child.chunks(hidden_BTD)]
    return _metrics_of(parts, input_ids_BT, parent_hidden_BTD, hidden_BTD)


@torch.no_grad()
def compare_heads(
    parent: Head, child: Head, input_ids_BT: Tensor, parent_hidden_BTD: Tensor, hidden_BTD: Tensor
) -> PredictionMetrics:
    """The same where the parent has final hidden states and a head, too: nobody's logits are ever whole."""
    parts = measures_of_heads(parent, child, next_ids(input_ids_BT), parent_hidden_BTD, hidden_BTD)
    return _metrics_of(parts, input_ids_BT, parent_hidden_BTD, hidden_BTD)


def measures_of_heads(
    parent: Head, child: Head, next_ids_N: Tensor, parent_hidden_BTD: Tensor, hidden_BTD: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What `compare_heads` computes of every token, a few tokens at a time."""
    flat, parts = parent_hidden_BTD.flatten(0, 1), []
    with nothing_large_kept():
        for part, logits in child.chunks(hidden_BTD):
            # unnamed, the parent's log-probabilities are gone before the next chunk's logits
            parts.append(_token_measures(parent.logits(flat[part]).float().log_softmax(-1), logits, next_ids_N[part]))
    return parts


@torch.no_grad()
def parents_own(parent: Head, input_ids_BT: Tensor, parent_hidden_BTD: Tensor) -> PredictionMetrics:
    """The parent compared with itself: its next-token loss, and no damage but rounding."""
    ids_N, parts = next_ids(input_ids_BT), []
    with nothing_large_kept():
        for part, logits in parent.chunks(parent_hidden_BTD):
            log_probs = logits.float().log_softmax(-1)
            parts.append(_token_measures(log_probs, log_probs, ids_N[part]))
    return _metrics_of(parts, input_ids_BT, parent_hidden_BTD, parent_hidden_BTD)


def next_ids(input_ids_BT: Tensor) -> Tensor:
    """Which token follows each, flattened. Nothing follows a sequence's last one; 0 stands there."""
    return F.pad(input_ids_BT[:, 1:], (0, 1)).flatten()


def _token_measures(parent_log_probs_NV: Tensor, logits_NV: Tensor, next_ids_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(KL, log-probability of the next token, how many tokens the child ranks above the parent's best one), each `[tokens]`."""
    logits = logits_NV.float()
    child_log_probs = F.log_softmax(logits, dim=-1)
    kl = kl_per_token(parent_log_probs_NV, child_log_probs)
    next_one = child_log_probs.gather(-1, next_ids_N.unsqueeze(-1)).squeeze(-1)
    best = parent_log_probs_NV.argmax(-1, keepdim=True)
    parents_best = logits.gather(-1, best)
    ahead = ~(logits <= parents_best)  # also where a logit is NaN
    ahead |= (logits == parents_best) & (torch.arange(logits.shape[-1], device=logits.device) < best)
    return kl, next_one, ahead.sum(-1, dtype=torch.int32)  # as int64, each comparison would take 8 bytes until they are added up


def _metrics_of(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]], input_ids_BT: Tensor, parent_BTD: Tensor | None, child_BTD: Tensor | None
) -> PredictionMetrics:
    """Means over the tokens of each sequence, from measures of runs of tokens."""
    kl, next_one, better = (torch.cat(column).view(input_ids_BT.shape) for column in zip(*parts, strict=True))
    loss = -next_one[:, :-1].contiguous().mean(-1)
    top1, top5, top10 = (tuple((better < k).float().mean(-1).tolist()) for k in (1, 5, 10))
    cosine: tuple[float, ...] = ()
    mse: tuple[float, ...] = ()
    if parent_BTD is not None and child_BTD is not None:
        parent, child = parent_BTD.float(), child_BTD.float()
        cosine = tuple(cosine_distance_per_sequence(child, parent).tolist())
        mse = tuple(normalised_mse_per_sequence(child, parent).tolist())
    tokens = int(input_ids_BT.numel())
    return PredictionMetrics(tuple(kl.mean(-1).tolist()), tuple(loss.tolist()), top1, top5, top10, tokens, cosine, mse)
