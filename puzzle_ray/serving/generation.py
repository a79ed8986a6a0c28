"""A request in the engine. Its caller reads the text as it comes, or cancels the request.

EngineBusy: too many requests wait already. EngineFailed: the engine stopped, or could not finish this request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from puzzle_ray.errors import PuzzleError
from puzzle_ray.serving.choosing import TokenLogprob
from puzzle_ray.serving.sampling import SamplingParams
from puzzle_ray.serving.text import TextStream

_log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled"]


class EngineBusy(PuzzleError):
    """`waiting` requests wait already."""

    def __init__(self, waiting: int) -> None:
        super().__init__(waiting)

    def __str__(self) -> str:
        return f"the engine is busy: {self.args[0]} requests wait already; try again in a moment"


class EngineFailed(PuzzleError):
    """The engine stopped, or could not finish this request: `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)

    def __str__(self) -> str:
        return f"the engine could not finish the request: {self.args[0]}"


@dataclass(frozen=True)
class Delta:
    """What has come since the last one: new tokens, and the text that can be shown with them (often a word or two, or "").

    The last one has a finish_reason. `logprobs` has an entry per token where they are asked for.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


class Generation:
    """A submitted request.

    One reader iterates over its deltas (`for` or `async for`), or waits with `result()`. Leaving the iteration early cancels the request
    and frees its slot. `token_ids`, `text` and `finish_reason` hold everything so far. `logprobs` has an entry per token where they are
    asked for, and `prompt_logprobs` one per token of the prompt, None for the first. `cached_tokens` of the prompt were not computed again.

    Tokens become text (by `text_stream`) when somebody reads it, several at a time. Only a request with stop strings has each token's
    text looked at as it comes. Times are seconds of `time.monotonic()`.
    """

    def __init__(self, prompt_ids: Sequence[int], params: SamplingParams, text_stream: TextStream) -> None:
        self.prompt_ids = tuple(prompt_ids)
        self.params = params
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.cached_tokens = 0
        self.cancelled = False
        self.submitted_at = time.monotonic()
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        self.is_counted = False  # by the engine's metrics
        self._changed = threading.Condition()
        self._text_stream = text_stream
        self._text, self._decoded, self._is_whole = "", 0, False  # the text of so many tokens
        self._read_tokens = self._read_logprobs = self._read_text = 0
        self._read_end = False
        self._done = False
        self._failure: str | None = None
        self._listener: Callable[[bool], None] | None = None

    # For the caller.

    def cancel(self) -> None:
        """Ask the engine to drop the request at its next step. Has no effect on a finished request."""
        self.cancelled = True

    @property
    def text(self) -> str:
        """The answer so far, without what may still become a stop string."""
        with self._changed:
            self._decode()
            return self._text

    def result(self, timeout_s: float | None = None) -> Generation:
        """Wait until the request is finished. Raises EngineFailed, or TimeoutError after `timeout_s` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._done, timeout_s):
                raise TimeoutError(f"the request is not finished after {timeout_s} s")
            self._decode()
        self.raise_failure()
        return self

    def raise_failure(self) -> None:
        """Raise EngineFailed if the engine could not finish the request."""
        if self._failure is not None:
            raise EngineFailed(self._failure)

    def __iter__(self) -> Iterator[Delta]:
        try:
            done = False
            while not done:
                with self._changed:
                    self._changed.wait_for(lambda: len(self.token_ids) > self._read_tokens or self._done)
                delta, done = self.take()
                if delta is not None:
                    yield delta
            self.raise_failure()
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        async for _, delta in stream_deltas([self]):
            yield delta

    def take(self) -> tuple[Delta | None, bool]:
        """What was not read yet, if there is anything, and whether the request has ended."""
        with self._changed:
            self._decode()
            tokens, logprobs = tuple(self.token_ids[self._read_tokens :]), tuple(self.logprobs[self._read_logprobs :])
            reason = None if self._read_end or self.finish_reason == "cancelled" else self.finish_reason
            delta = Delta(tokens, self._text[self._read_text :], reason, logprobs)
            self._read_tokens, self._read_logprobs, self._read_text = len(self.token_ids), len(self.logprobs), len(self._text)
            self._read_end = self._done
            return delta if tokens or delta.text or reason else None, self._done

    def listen(self, listener: Callable[[bool], None] | None) -> None:
        """Have another thread call `listener` whenever something changes, with whether it was the last change."""
        with self._changed:
            self._listener = listener

    # For the engine.

    @property
    def done(self) -> bool:
        """Whether it gets nothing more."""
        return self._done

    @property
    def unwanted(self) -> bool:
        """Whether nobody needs another token of it."""
        return self.cancelled or self._done

    def add(self, token_id: int | None, reason: FinishReason | None = None, logprob: TokenLogprob | None = None) -> None:
        """Append a token, the last one where there is a reason. A request with max_tokens=0 ends without a token."""
        with self._changed:
            if self._done:
                return
            if token_id is not None:
                self.token_ids.append(token_id)
                self.first_token_at = self.first_token_at or time.monotonic()
            if logprob is not None:
                self.logprobs.append(logprob)
            if self.params.stop:
                self._decode(is_last=reason is not None)
                reason = "stop" if self._text_stream.stopped else reason
            if reason is not None and not self._done:
                self.finish_reason, self._done, self.ended_at = reason, True, time.monotonic()
            self._notify()

    def end(self, failure: str | None = None) -> None:
        """Finish without another token: the request was cancelled, or failed for the reason `failure`."""
        with self._changed:
            if not self._done:
                self._failure = failure
                self.finish_reason = "cancelled" if failure is None else None
                self._done, self.ended_at = True, time.monotonic()
            self._notify()

    def _decode(self, is_last: bool = False) -> None:
        """Text for all tokens there are. What the tokenizer raises over them ends this request alone."""
        try:
            if self._decoded < len(self.token_ids):
                fresh, self._decoded = self.token_ids[self._decoded :], len(self.token_ids)
                self._text += self._text_stream.push_all(fresh)
            if (is_last or self.finish_reason in ("stop", "length")) and not self._is_whole:
                self._is_whole = True
                self._text += self._text_stream.finish()
        except Exception as error:
            _log.exception("a request's text cannot be made")
            self._failure, self.finish_reason = f"{type(error).__name__}: {error}", None
            self._is_whole = self._done = True
            self.ended_at = self.ended_at or time.monotonic()

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._listener is not None:
            try:
                self._listener(self._done)
            except RuntimeError:  # the reader's event loop is closed, so nobody reads any more
                self._listener = None
                self.cancel()


class _News:
    """Tells a reader on an event loop of changes: at once where one ends, else at most every `interval_s()` seconds."""

    def __init__(self, interval_s: Callable[[], float]) -> None:
        self._loop = asyncio.get_running_loop()
        self._interval_s = interval_s
        self._quiet_until = 0.0 if interval_s() != float("inf") else float("inf")
        self._event = asyncio.Event()

    def tell(self, done: bool) -> None:
        """From any thread."""
        if done or self._loop.time() >= self._quiet_until:
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        await self._event.wait()
        self._event.clear()

    def handed_on(self) -> None:
        """What was new has been read."""
        interval_s = self._interval_s()
        if 0 < interval_s < float("inf"):
            self._quiet_until = self._loop.time() + interval_s
            self._loop.call_later(interval_s, self._event.set)


async def stream_deltas(
    generations: Sequence[Generation], interval_s: Callable[[], float] = lambda: 0.0
) -> AsyncGenerator[tuple[int, Delta], None]:
    """(index, delta) of several requests. The first come at once, the following at most every `interval_s()` seconds.

    Leaving early cancels all requests. Raises EngineFailed.
    """
    news = _News(interval_s)
    for generation in generations:
        generation.listen(news.tell)
    try:
        unfinished = dict(enumerate(generations))
        while unfinished:
            handed_on = False
            for index, generation in list(unfinished.items()):
                delta, done = generation.take()
                if delta is not None:
                    handed_on = True
                    yield index, delta
                if done:
                    generation.raise_failure()
                    del unfinished[index]
            if handed_on:
                news.handed_on()
            if unfinished:
                await news.wait()
    finally:
        for generation in generations:
            generation.listen(None)
            generation.cancel()


async def wait_for_all(generations: Sequence[Generation]) -> None:
    """Until all have ended. A call that is cancelled cancels them. Raises EngineFailed."""
    async with contextlib.aclosing(stream_deltas(generations, lambda: float("inf"))) as stream:
        async for _ in stream:
            pass
