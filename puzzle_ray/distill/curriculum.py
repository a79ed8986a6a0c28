"""Which sequences every step of global distillation reads: of one length, or of one length after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from puzzle_ray.data.order import Sequences, TokenArray, Tokens
from puzzle_ray.distill.settings import GkdConfig, GkdStage
from puzzle_ray.errors import ConfigError


def stages_of(config: GkdConfig, sequence_length: int) -> tuple[GkdStage, ...]:
    """The stages of a distillation of text in sequences of `sequence_length`; without `gkd.stages` it is one, or none for 0 tokens."""
    if config.stages or not config.tokens:
        return config.stages
    if config.micro_batch_tokens < sequence_length:
        problem = f"{config.micro_batch_tokens} is less than one sequence of {sequence_length}"
        raise ConfigError("gkd.micro_batch_tokens", problem)
    whole = config.micro_batch_tokens // sequence_length * sequence_length
    stage = GkdStage(sequence_length=sequence_length, tokens=config.tokens, micro_batch_tokens=whole)
    return (stage,)


def gkd_steps(config: GkdConfig) -> int:
    """Optimizer steps until all tokens are used, rounded up in every stage; 0 for 0 tokens."""
    return config.total_steps


def of_length(tokens: Tokens, length: int) -> Tokens:
    """The same text in sequences of another length: consecutive ones joined, or each cut into equal parts.

    Raises ConfigError where neither length is a multiple of the other, or where there is not one such sequence.
    """
    base = tokens.sequences.shape[1]
    if length == base:
        return tokens
    if tokens.rows is not None:
        raise ValueError("the sequences of a part do not follow each other")
    where = "gkd.stages"
    if length % base and base % length:
        problem = f"sequence_length={length} is neither a multiple nor a part of data.sequence_length={base}"
        raise ConfigError(where, problem, f"write a multiple of {base}")
    count = tokens.num_tokens // length
    if not count:
        problem = f"no sequence of {length} tokens: there are {tokens.num_tokens} tokens to train on"
        raise ConfigError(where, problem, "give more text, or raise data.max_train_tokens")
    return replace(tokens, sequences=_OtherLength(tokens.sequences, length))


class _OtherLength:
    """Sequences read in another length, without a copy: consecutive ones joined, or each cut into equal parts."""

    def __init__(self, base: Sequences, length: int) -> None:
        self.base, self.length = base, length
        self.own = base.shape[1]
        self.shape = (len(base) * self.own // length, length)
        window = int(getattr(base, "window", len(base)))
        self.window = max(1, window * self.own // length)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: Any, /) -> TokenArray:
        rows = np.arange(len(self))[chosen]
        if self.length > self.own:
            each = self.length // self.own
            joined = (rows[:, None] * each + np.arange(each)).reshape(-1)
            return self.base[joined].reshape(len(rows), self.length)
        parts = self.own // self.length
        cut = self.base[rows // parts].reshape(len(rows), parts, self.length)
        return cut[np.arange(len(rows)), rows % parts]


@dataclass(frozen=True)
class Curriculum:
    """The text of every step. A function of (seed, step, rank), so that a resumed run reads on where it was."""

    stages: tuple[GkdStage, ...]
    texts: tuple[Tokens, ...]
    seed: int
    num_workers: int
    gradient_accumulation: int = 1

    @classmethod
    def of(cls, tokens: Tokens, config: GkdConfig, seed: int) -> Curriculum:
        """Raises ConfigError where the text cannot be read in the lengths that are asked for."""
        stages = stages_of(config, tokens.sequences.shape[1])
        return cls(
            stages,
            tuple(of_length(tokens, stage.sequence_length) for stage in stages),
            seed,
            config.num_workers,
            config.gradient_accumulation,
        )

    @cached_property
    def steps(self) -> Sequence[int]:
        """The number of steps of every stage."""
        return [math.ceil(stage.tokens / (stage.micro_batch_tokens * self.micro_batches)) for stage in self.stages]

    @property
    def micro_batches(self) -> int:
        """How many a step takes: of all workers, and of each one after the other."""
        return self.num_workers * self.gradient_accumulation

    @property
    def total_steps(self) -> int:
        return sum(self.steps)

    @property
    def tokens(self) -> int:
        """How many tokens all steps read."""
        return sum(n * stage.micro_batch_tokens for n, stage in zip(self.steps, self.stages, strict=True)) * self.micro_batches

    def batch(self, step: int, rank: int, round_: int = 0) -> Tensor:
        """The token ids that a worker reads at a step, `[sequences, sequence_length]`: its micro-batch number `round_`."""
        number = 0
        while step >= self.steps[number]:
            step -= self.steps[number]
            number += 1
        stage = self.stages[number]
        sequences = stage.micro_batch_tokens // stage.sequence_length
        place = (step * self.gradient_accumulation + round_) * self.num_workers + rank
        return self.texts[number].batch(self.seed + number, place, sequences)
