"""From the engine's steps to requests: handed on by a thread of its own, so that the next forward pass need not wait for readers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from puzzle_ray.serving.choosing import TokenLogprob
from puzzle_ray.serving.generation import FinishReason, Generation
from puzzle_ray.serving.metrics import EngineMetrics

# Steps that the engine may be ahead of what is handed on. Where tokenizer and readers are slower than the model, it waits for them.
_MAX_STEPS_AHEAD = 64


class Outcome(IntEnum):
    """What a new token means for its request."""

    GOES_ON = 0
    STOP = 1
    LENGTH = 2
    FAILED = 3


_REASONS: dict[int, FinishReason | None] = {Outcome.GOES_ON: None, Outcome.STOP: "stop", Outcome.LENGTH: "length"}


@dataclass(frozen=True)
class Step:
    """The tokens of one forward pass: one per generation, None for a request that asked for no token."""

    generations: Sequence[Generation]
    token_ids: Sequence[int | None]
    outcomes: Sequence[int]
    logprobs: Sequence[TokenLogprob | None] | None = None


@dataclass(frozen=True)
class _End:
    generation: Generation
    failure: str | None


class Output:
    """Hands tokens and endings to their generations, in the order in which the engine gives them."""

    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics
        self._queue: queue.Queue[Step | _End | None] = queue.Queue(_MAX_STEPS_AHEAD)
        self._thread = threading.Thread(target=self._run, name="engine output", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def put(self, step: Step) -> None:
        """New tokens. Waits where readers are far behind."""
        self._queue.put(step)

    def end(self, generation: Generation, failure: str | None = None) -> None:
        """The generation gets no more tokens: it was cancelled, or it failed."""
        if self.alive:
            self._queue.put(_End(generation, failure))
        else:
            self._end(generation, failure)

    def close(self, timeout_s: float) -> None:
        """Waits until all that was put has been handed on."""
        if self.alive:
            self._queue.put(None)
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, _End):
                self._end(item.generation, item.failure)
            else:
                self._hand_on(item)

    def _hand_on(self, step: Step) -> None:
        logprobs = step.logprobs or [None] * len(step.generations)
        for generation, token_id, outcome, logprob in zip(step.generations, step.token_ids, step.outcomes, logprobs, strict=True):
            if generation.done:
                continue  # a stop string has ended it, and the engine went on for a step
            if outcome == Outcome.FAILED:
                generation.end("the model's logits are not finite numbers")
            else:
                generation.add(token_id, _REASONS[outcome], logprob)
            if generation.done:
                self._metrics.ended(generation)

    def _end(self, generation: Generation, failure: str | None) -> None:
        generation.end(failure)
        self._metrics.ended(generation)
