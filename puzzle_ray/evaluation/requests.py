"""What an evaluation asks of one model, in chunks. The answers to a chunk depend on it and on the model alone.

So chunks can be answered in any order, by any number of processes, with the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

CHUNK_REQUESTS = 256
ANSWERS = "answers"  # the folder of an unfinished stage that answers are kept in
Ids = tuple[int, ...]
Answer = Mapping[str, npt.NDArray[Any]]  # arrays by name; the names stand at each kind of chunk
Item = TypeVar("Item")


@dataclass(frozen=True)
class Likelihoods:
    """How likely each continuation is behind its context. Both have at least one token.

    Answer: `log_prob` (sum over the continuation's tokens, nats) and `is_greedy` (whether each token is the most probable one), both
    `[pairs]`. A context that is too long for the model loses its beginning.
    """

    pairs: tuple[tuple[Ids, Ids], ...]

    def to_json(self) -> Any:
        return ["likelihoods", self.pairs]


@dataclass(frozen=True)
class Continuations:
    """At most `max_tokens` greedy tokens behind each prompt; they end at one of the strings of `stop` and at the end of text.

    `temperature` above 0 draws tokens instead, each prompt with a seed of its own. Answer: `ids`, `[prompts, max_tokens]`, filled up
    with -1, and `length`, `[prompts]`. A prompt that leaves no room for the answer loses its beginning.
    """

    prompts: tuple[Ids, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0

    def to_json(self) -> Any:
        return ["continuations", self.prompts, self.max_tokens, self.stop, self.temperature, self.top_p]


@dataclass(frozen=True)
class Predictions:
    """What the model predicts at every position of sequences, `input_ids` `[sequences, tokens]`.

    Answer: `loss` (of the next token, nats) and `best` (the most probable next token), both `[sequences, tokens - 1]`. `separator` is the
    token that documents begin with, where attention does not cross them (see `puzzle_ray.data.packing`).
    """

    input_ids: npt.NDArray[np.int64] = field(hash=False)
    separator: int | None = None

    def to_json(self) -> Any:
        mask = [] if self.separator is None else [self.separator]
        return ["predictions", self.input_ids.tolist(), *mask]


Chunk = Likelihoods | Continuations | Predictions
Asked = tuple[str, Chunk]  # the model's name, and what it is asked
Ask = Callable[[Sequence[Asked]], list[Answer]]  # in the order asked


def file_name(asked: Asked) -> str:
    """Where an answer is kept while its stage is not finished."""
    name, chunk = asked
    content = hashlib.sha256(json.dumps(chunk.to_json()).encode()).hexdigest()
    return f"{ANSWERS}/{name}-{content[:20]}.safetensors"


def chunked(items: Sequence[Item], size: int = CHUNK_REQUESTS) -> Iterator[tuple[Item, ...]]:
    for start in range(0, len(items), size):
        yield tuple(items[start : start + size])


def joined(answers: Iterable[Answer], name: str) -> npt.NDArray[Any]:
    """One array of several answers, in order."""
    return np.concatenate([answer[name] for answer in answers])
