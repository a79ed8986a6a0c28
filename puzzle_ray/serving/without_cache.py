"""Text generated without a KV cache, for models whose layers lie in shards, or that the engine has no masks for: every token reads the
whole text before it again.

Tokens are chosen as the engine chooses them, and requests end where they end there.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch

from puzzle_ray.models.head import Head
from puzzle_ray.models.shards import states_of_batches
from puzzle_ray.serving.engine import eos_ids
from puzzle_ray.serving.generation import FinishReason, Generation
from puzzle_ray.serving.output import Outcome
from puzzle_ray.serving.sampling import SamplingParams
from puzzle_ray.serving.sequences import Endings, Sequence, chooser_for
from puzzle_ray.serving.text import TextStream, special_token_ids


@torch.inference_mode()
def continued(
    model: Any,
    tokenizer: Any,
    prompts: SequenceOf[SequenceOf[int]],
    params: SequenceOf[SamplingParams],
    max_length: int,
    batch_tokens: int,
) -> list[Generation]:
    """The finished answers to prompts, in their order. Prompt and answer have at most `max_length` tokens together, and a forward pass has
    `batch_tokens`, padding included. Raises EngineFailed."""
    ends, special = eos_ids(model), special_token_ids(tokenizer)
    sequences = []
    for prompt, each in zip(prompts, params, strict=True):
        hidden = special.union(() if each.ignore_eos else ends, each.stop_token_ids)
        sequences.append(Sequence(Generation(prompt, each, TextStream(tokenizer, prompt, each.stop, hidden)), max_length))
    for sequence in sequences:
        if sequence.limit <= sequence.prompt_length:  # nothing is asked for
            sequence.generation.add(None, "length")
    while running := [sequence for sequence in sequences if not sequence.generation.done]:
        _add_a_token_each(model, running, ends, batch_tokens)
    return [sequence.generation.result() for sequence in sequences]


def _add_a_token_each(model: Any, running: SequenceOf[Sequence], ends: frozenset[int], batch_tokens: int) -> None:
    head, groups, batches = Head.of(model), _groups(running, batch_tokens), []
    for group in groups:
        ids = torch.zeros(len(group), len(group[0].token_ids), dtype=torch.long)
        for row, sequence in zip(ids, group, strict=True):
            row[: len(sequence.token_ids)] = torch.tensor(sequence.token_ids)  # no token of a text sees the padding behind it
        batches.append(ids.to(model.device))
    finals = states_of_batches(model, batches, [None] * len(batches))
    for group, final in zip(groups, finals, strict=True):
        lengths = np.array([len(sequence.token_ids) for sequence in group], np.int64)
        rows, last = torch.arange(len(group), device=final.device), torch.from_numpy(lengths - 1).to(final.device)
        logits = head.logits(final[rows, last])
        chosen = chooser_for(group, logits.shape[-1], logits.device).choose(logits, lengths).token_ids.cpu().numpy()
        outcomes = Endings(group, ends).outcomes(chosen, lengths + 1)
        for sequence, token, outcome in zip(group, chosen.tolist(), outcomes.tolist(), strict=True):
            _note(sequence, token, outcome)


def _note(sequence: Sequence, token: int, outcome: int) -> None:
    if outcome == Outcome.FAILED:
        sequence.generation.end("the model's logits are not finite")
        return
    reason: FinishReason | None = None
    if outcome != Outcome.GOES_ON:
        reason = "stop" if outcome == Outcome.STOP else "length"
    sequence.token_ids.append(token)
    sequence.generation.add(token, reason)


def _groups(running: SequenceOf[Sequence], batch_tokens: int) -> list[list[Sequence]]:
    """Requests of like length together, the longest first: so many that a forward pass has the tokens it may have, and one at least."""
    groups: list[list[Sequence]] = []
    for sequence in sorted(running, key=lambda each: -len(each.token_ids)):
        if not groups or len(groups[-1][0].token_ids) * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(sequence)
    return groups
