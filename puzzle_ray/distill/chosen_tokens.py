"""Tokens that stand in an answer: those the next-token loss may be limited to (`gkd.lm_tokens`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle_ray.distill.settings import LmTokens
from puzzle_ray.errors import ConfigError

Markers = tuple[tuple[int, ...], tuple[int, ...]]  # the ids around an answer


def answer_markers(rule: LmTokens | None, tokenizer: Any) -> Markers | None:
    """The ids of the texts around an answer; None where answers are not asked for. Raises ConfigError where a text has no ids."""
    if rule is None or not rule.after or not rule.until:
        return None
    ids = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (rule.after, rule.until)]
    for name, text, own in (("after", rule.after, ids[0]), ("until", rule.until, ids[1])):
        if not own:
            raise ConfigError(f"gkd.lm_tokens.{name}", f"{text!r} has no tokens", "write the marker as it stands in the text")
    return ids[0], ids[1]


def read_markers(rule: LmTokens | None, folder: Path, trusted: bool) -> Markers | None:
    """`answer_markers` by the tokenizer of a model's folder, which is not read where no answers are asked for."""
    from puzzle_ray.models.tokenizer import read_tokenizer

    return answer_markers(rule, read_tokenizer(folder, trusted)) if rule is not None and rule.after else None


def in_answers(input_ids: Tensor, after: Sequence[int], until: Sequence[int]) -> Tensor:
    """Which tokens stand in an answer, `[batch, tokens]`: behind a marker `after`, up to and with the next marker `until`."""
    begun, ended = _last_before(input_ids, after), _last_before(input_ids, until)
    return (begun >= 0) & (begun > ended)


def _last_before(input_ids: Tensor, marker: Sequence[int]) -> Tensor:
    """For every token, where the last marker that is complete before it ends; -1 where there is none yet."""
    batch, tokens = input_ids.shape
    ends = torch.ones(batch, tokens, dtype=torch.bool, device=input_ids.device)
    for back, wanted in enumerate(reversed(marker)):
        ends[:, back:] &= input_ids[:, : tokens - back] == wanted
        ends[:, :back] = False
    positions = torch.arange(tokens, device=input_ids.device).expand(batch, tokens)
    last = torch.where(ends, positions, -1).cummax(dim=1).values
    return torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
