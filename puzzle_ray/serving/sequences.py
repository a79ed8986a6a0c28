"""Requests as the engine's thread sees them: what is computed of each, and those that are decoded together."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from puzzle_ray.serving.choosing import NOT_A_TOKEN, Chooser
from puzzle_ray.serving.generation import Generation
from puzzle_ray.serving.output import Outcome
from puzzle_ray.serving.sampling import SamplingParams


class Sequence:
    """A request with its tokens. `computed` of them are in its row of the cache. It ends at `limit` tokens, the prompt's included.

    A request that is put back for lack of memory keeps its tokens. They are computed again, and it goes on as if nothing had happened.
    """

    def __init__(self, generation: Generation, max_length: int) -> None:
        params = generation.params
        prompt = len(generation.prompt_ids)
        self.generation = generation
        self.params = params
        self.seed = random.getrandbits(64) if params.seed is None else params.seed
        self.token_ids: list[int] = list(generation.prompt_ids)
        self.computed = 0
        self.limit = max_length if params.max_tokens is None else min(prompt + params.max_tokens, max_length)
        self.reports_prompt = params.prompt_logprobs

    @property
    def left(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.token_ids) - self.computed

    @property
    def prompt_length(self) -> int:
        return len(self.generation.prompt_ids)

    def stop_ids(self, eos_ids: frozenset[int]) -> set[int]:
        """The tokens after which it ends."""
        return set(self.params.stop_token_ids) | (set() if self.params.ignore_eos else set(eos_ids))


class Endings:
    """When each of several requests ends, as arrays: all of them are asked at once."""

    def __init__(self, sequences: SequenceOf[Sequence], eos_ids: frozenset[int]) -> None:
        stops = [sequence.stop_ids(eos_ids) for sequence in sequences]
        self._stop_ids = np.full((len(stops), max(1, max(map(len, stops), default=0))), NOT_A_TOKEN - 1, np.int64)
        for row, ids in enumerate(stops):
            self._stop_ids[row, : len(ids)] = list(ids)
        self._limits = np.array([sequence.limit for sequence in sequences], np.int64)

    def outcomes(self, token_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """An Outcome for each of the new tokens, with which the requests have `lengths` tokens."""
        found = np.full(len(token_ids), Outcome.GOES_ON, np.int64)
        found[lengths >= self._limits] = Outcome.LENGTH
        found[(token_ids[:, None] == self._stop_ids).any(axis=1)] = Outcome.STOP
        found[token_ids == NOT_A_TOKEN] = Outcome.FAILED
        return found


def chooser_for(sequences: SequenceOf[Sequence], vocab_size: int, device: torch.device) -> Chooser:
    """The settings of several requests as tensors."""
    params: list[SamplingParams] = [sequence.params for sequence in sequences]
    seen = [(each.generation.prompt_ids, each.token_ids[each.prompt_length :]) for each in sequences]
    return Chooser(params, [sequence.seed for sequence in sequences], seen, vocab_size, device)


class Batch:
    """The requests that are decoded together: row i of the cache belongs to `sequences[i]`. Made anew whenever its members change.

    The last token of every request is chosen, but not in the cache yet. Steps keep their tokens here; `settle` hands them to the requests.
    """

    def __init__(self, sequences: SequenceOf[Sequence], eos_ids: frozenset[int], vocab_size: int, device: torch.device) -> None:
        self.sequences = tuple(sequences)
        self.generations = tuple(sequence.generation for sequence in sequences)
        self.lengths = np.array([len(sequence.token_ids) for sequence in sequences], np.int64)
        self.chooser = chooser_for(sequences, vocab_size, device)
        self.endings = Endings(sequences, eos_ids)
        self.next_ids: Tensor = torch.tensor([sequence.token_ids[-1] for sequence in sequences], device=device)
        self._steps: list[np.ndarray] = []

    def note(self, next_ids: Tensor, token_ids: np.ndarray) -> None:
        """The tokens of a step."""
        self.next_ids = next_ids
        self.lengths = self.lengths + 1
        self._steps.append(token_ids)

    def settle(self) -> None:
        """Give the requests their tokens of all steps so far."""
        if self._steps:
            for sequence, new in zip(self.sequences, np.stack(self._steps, axis=1).tolist(), strict=True):
                sequence.token_ids += new
                sequence.computed = len(sequence.token_ids) - 1
            self._steps = []
