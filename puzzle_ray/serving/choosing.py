"""One token for every request of a batch, chosen from the logits by tensor operations alone.

The settings of a batch become tensors once, when its members change. A decode step then runs the same few operations whatever the number
of requests. A request's token depends only on its own logits, settings, seed and position.

Legend: B requests, V vocabulary, E stop tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from puzzle_ray.serving.sampling import SamplingParams

# Below this temperature a token is as good as the likeliest one; above the highest all are as good as equal. In between, no quotient
# of float32 overflows.
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 1e-5, 1e5
NOT_A_TOKEN = -1


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, and (token id, log-probability) of the likeliest tokens in its place, the likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Chosen:
    """The tokens of one step: `token_ids` `[B]` on the logits' device, `NOT_A_TOKEN` for a row whose logits are not finite.

    `logprobs`: one entry per row, None where the row asks for none.
    """

    token_ids: Tensor
    logprobs: tuple[TokenLogprob | None, ...] | None = None


class Chooser:
    """The settings of the requests in rows 0..B-1, as tensors.

    seeds: one 64-bit number per row.
    seen: token ids of (prompt, answer so far) of each row. Only rows with penalties are looked at.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        seen: Sequence[tuple[Sequence[int], Sequence[int]]],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._device = device
        self._sampled = self._rows([request.temperature > 0 for request in params])
        self._sampled_at = np.flatnonzero([request.temperature > 0 for request in params])
        drawn = [request for request in params if request.temperature > 0]
        self._seeds = np.array(
            [seed & (2**64 - 1) for seed, each in zip(seeds, params, strict=True) if each.temperature > 0], np.uint64
        )
        self._temperature = self._column([min(max(each.temperature, _MIN_TEMPERATURE), _MAX_TEMPERATURE) for each in drawn])
        narrowed = [bool(each.top_k or each.top_p < 1 or each.min_p) for each in drawn]
        self._narrowed = self._rows(narrowed)
        few = [each for each, is_narrowed in zip(drawn, narrowed, strict=True) if is_narrowed]
        self._top_p = self._column([each.top_p for each in few])
        self._min_p = self._column([each.min_p for each in few])
        self._top_k = torch.tensor([min(each.top_k or vocab_size, vocab_size) for each in few], device=device)[:, None]
        self._num_logprobs = [each.logprobs for each in params] if any(each.logprobs is not None for each in params) else None
        self._penalties = _Penalties(params, seen, vocab_size, device) if any(each.penalised for each in params) else None

    def choose(self, logits: Tensor, positions: np.ndarray) -> Chosen:
        """Chooses from `logits` `[B, V]`. `positions` `[B]`: each new token's own, which with the seed decides the draw."""
        raw, logits = logits, logits.float()
        if self._penalties is not None:
            logits = self._penalties.applied(logits)
        chosen = logits.argmax(dim=-1)  # as max() finds it, in a third of its time; of a row with NaN, the NaN
        best = logits.gather(1, chosen[:, None])[:, 0]
        if self._sampled is not None:
            rows = self._sampled
            draws = torch.from_numpy(uniform(self._seeds, positions[self._sampled_at])).to(self._device)
            chosen[rows] = self._sample(logits[rows] - best[rows, None], draws)
        chosen = chosen.masked_fill(~best.isfinite(), NOT_A_TOKEN)
        if self._penalties is not None:
            self._penalties.count(chosen)
        return Chosen(chosen, None if self._num_logprobs is None else token_logprobs(raw, chosen, self._num_logprobs))

    def _sample(self, logits: Tensor, draws: Tensor) -> Tensor:
        """Inverts the distribution of each row at its draw. The largest logit of every row is 0."""
        probabilities = (logits / self._temperature).softmax(dim=-1)
        if self._narrowed is None:
            return _inverse(probabilities.cumsum(dim=-1), draws)
        rows = self._narrowed
        chosen = torch.zeros(len(draws), dtype=torch.long, device=self._device)
        chosen[rows] = self._sample_narrowed(probabilities[rows], draws[rows])
        if len(rows) < len(draws):
            others = torch.ones(len(draws), dtype=torch.bool, device=self._device)
            others[rows] = False
            chosen[others] = _inverse(probabilities[others].cumsum(dim=-1), draws[others])
        return chosen

    def _sample_narrowed(self, probabilities: Tensor, draws: Tensor) -> Tensor:
        """Top-k, then top-p and min-p. In order of falling probability each keeps a beginning, so each is a length of at least 1."""
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        cumulative = ordered.cumsum(dim=-1)
        mass = cumulative.gather(1, self._top_k - 1)
        in_top_p = ((cumulative - ordered) < self._top_p * mass).sum(dim=-1, keepdim=True)
        in_min_p = (ordered >= self._min_p * ordered[:, :1]).sum(dim=-1, keepdim=True)
        kept = torch.minimum(self._top_k, torch.minimum(in_top_p, in_min_p)).clamp(min=1)
        rank = _inverse(cumulative, draws, kept)
        return order.gather(1, rank[:, None])[:, 0]

    def _rows(self, wanted: Sequence[bool]) -> Tensor | None:
        found = [row for row, is_wanted in enumerate(wanted) if is_wanted]
        return torch.tensor(found, device=self._device) if found else None

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)[:, None]


def _inverse(cumulative: Tensor, draws: Tensor, kept: Tensor | None = None) -> Tensor:
    """The first index at which `cumulative` `[B, V]` exceeds each draw's share of the mass of the first `kept` `[B, 1]` entries."""
    if kept is None:
        kept = torch.full((len(draws), 1), cumulative.shape[1], device=cumulative.device)
    target = draws[:, None] * cumulative.gather(1, kept - 1)
    # A draw close to 1 may be rounded up to the whole mass. The last entry with any mass is taken then.
    last = torch.searchsorted(cumulative, cumulative.gather(1, kept - 1), right=False)
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), torch.minimum(last, kept - 1))[:, 0]


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) per pair of seed and position, float32. The pair decides it: SplitMix64, counted by the position."""
    with np.errstate(over="ignore"):
        mixed = seeds + np.uint64(0x9E3779B97F4A7C15) * (positions.astype(np.uint64) + np.uint64(1))
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return ((mixed >> np.uint64(40)).astype(np.float64) / 2**24).astype(np.float32)  # 24 bits: exact in float32


class _Penalties:
    """What earlier tokens and `logit_bias` do to the logits: counts `[B, V]`, of the rows that have any."""

    def __init__(
        self,
        params: Sequence[SamplingParams],
        seen: Sequence[tuple[Sequence[int], Sequence[int]]],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        rows = [row for row, request in enumerate(params) if request.penalised]
        self._rows = torch.tensor(rows, device=device)
        self._in_answer = torch.zeros(len(rows), vocab_size, device=device)
        self._in_prompt = torch.zeros(len(rows), vocab_size, dtype=torch.bool, device=device)
        self._bias = torch.zeros(len(rows), vocab_size, device=device)
        for index, row in enumerate(rows):
            prompt, answer = seen[row]
            self._in_prompt[index, torch.tensor(prompt, dtype=torch.long, device=device)] = True
            if answer:
                ids = torch.tensor(answer, device=device)
                self._in_answer[index].index_add_(0, ids, torch.ones(len(ids), device=device))
            for token_id, bias in params[row].logit_bias:
                self._bias[index, token_id] += bias

        def column(name: str) -> Tensor:
            return torch.tensor([getattr(params[row], name) for row in rows], dtype=torch.float32, device=device)[:, None]

        self._presence, self._frequency = column("presence_penalty"), column("frequency_penalty")
        self._repetition = column("repetition_penalty")

    def applied(self, logits: Tensor) -> Tensor:
        """A copy of `logits`, with the penalties."""
        mine, logits = logits[self._rows], logits.clone()
        repeated = self._in_prompt | (self._in_answer > 0)
        mine = torch.where(repeated, torch.where(mine > 0, mine / self._repetition, mine * self._repetition), mine)
        mine = mine - self._presence * (self._in_answer > 0) - self._frequency * self._in_answer + self._bias
        logits[self._rows] = mine
        return logits

    def count(self, chosen: Tensor) -> None:
        """Note the new tokens."""
        mine = chosen[self._rows].clamp(min=0)[:, None]
        self._in_answer.scatter_add_(1, mine, torch.ones_like(mine, dtype=self._in_answer.dtype))


def token_logprobs(logits: Tensor, token_ids: Tensor, wanted: Sequence[int | None]) -> tuple[TokenLogprob | None, ...]:
    """The log-probabilities of `token_ids` `[N]` by `logits` `[N, V]`, with as many alternatives per row as `wanted` says."""
    rows = [row for row, number in enumerate(wanted) if number is not None]
    most = min(max(int(wanted[row] or 0) for row in rows), logits.shape[1])
    logprobs = logits[rows].float().log_softmax(dim=-1)
    ids = token_ids[rows].clamp(min=0)
    own = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    top_values, top_ids = logprobs.topk(most, dim=-1)
    entries: list[TokenLogprob | None] = [None] * len(wanted)
    listed = zip(rows, ids.tolist(), own, top_ids.tolist(), top_values.tolist(), strict=True)
    for row, token_id, logprob, alternatives, values in listed:
        number = wanted[row] or 0
        entries[row] = TokenLogprob(token_id, logprob, tuple(zip(alternatives[:number], values[:number], strict=True)))
    return tuple(entries)
