"""How a request wants its tokens chosen, and the choice itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle_ray.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends.

    max_tokens: at most this many new tokens. None: as many as the slot holds.
    temperature: 0 is greedy.
    top_p: tokens are drawn from the smallest set of the likeliest ones with at least this probability.
    top_k: tokens are drawn from this many of the likeliest ones. 0: from all.
    seed: the same seed draws the same tokens, whatever else is served at the same time.
    stop: the answer ends before any of these strings.
    ignore_eos: the answer does not end at an end-of-text token.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError("max_tokens", f"is {self.max_tokens}", "ask for at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError("temperature", f"is {self.temperature}", "give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError("top_p", f"is {self.top_p}", "give a share above 0, at most 1")
        if self.top_k < 0:
            raise ConfigError("top_k", f"is {self.top_k}", "give 0 (all tokens) or more")
        if any(not text for text in self.stop):
            raise ConfigError("stop", "holds an empty string", "leave it out")


def choose_tokens(logits: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> list[int | None]:
    """One token per row of `logits` `[B, vocab]`. None for a row with NaN.

    `draws` are uniform in [0, 1), one per row. Greedy rows ignore theirs. The others invert their cumulative distribution at their draw.
    So a row's token depends only on its own logits and draw.
    """
    best, greedy = logits.max(dim=-1)  # the maximum of a row with NaN is NaN
    chosen: list[int | None] = greedy.tolist()
    sampled = [row for row, request in enumerate(params) if request.temperature > 0]
    if sampled:
        tokens = _sample(logits[sampled].float(), [params[row] for row in sampled], [draws[row] for row in sampled])
        for row, token in zip(sampled, tokens, strict=True):
            chosen[row] = token
    for row in best.isnan().nonzero().flatten().tolist():
        chosen[row] = None
    return chosen


def _sample(logits: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> list[int]:
    """Applies temperature, then top-k, then top-p. In order of falling probability, both keep a prefix, so each filter is a length."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    vocab = logits.shape[1]
    scaled = logits / column([max(request.temperature, 1e-5) for request in params])
    probabilities, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    cumulative = probabilities.cumsum(dim=-1)
    in_top_k = torch.tensor([min(request.top_k or vocab, vocab) for request in params], device=logits.device)[:, None]
    mass = cumulative.gather(1, in_top_k - 1)
    before = cumulative - probabilities  # probability of all likelier tokens; it is 0 for the first token, which is always kept
    in_top_p = (before < column([request.top_p for request in params]) * mass).sum(dim=-1, keepdim=True)
    kept = torch.minimum(in_top_k, in_top_p)
    target = column(draws) * cumulative.gather(1, kept - 1)
    rank = torch.minimum(torch.searchsorted(cumulative, target, right=True), kept - 1)
    return [int(token) for token in order.gather(1, rank).flatten().tolist()]
