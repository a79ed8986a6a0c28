"""A request in the engine. Its caller reads the text as it comes, or cancels the request.

EngineBusy: too many requests wait already. EngineFailed: the engine stopped, or could not finish this request.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from puzzle_ray.errors import PuzzleError
from puzzle_ray.serving.sampling import SamplingParams

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
    """One new token, and the text that can be shown with it (often "" or one word)."""

    token_id: int
    text: str
    finish_reason: FinishReason | None = None


class Generation:
    """A submitted request.

    One reader iterates over its deltas (`for` or `async for`), or waits with `result()`. Leaving the iteration early cancels the request
    and frees its slot. `token_ids`, `text` and `finish_reason` hold everything so far.
    """

    def __init__(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self.prompt_ids = tuple(prompt_ids)
        self.params = params
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.cancelled = False
        self._changed = threading.Condition()
        self._fresh: list[Delta] = []
        self._done = False
        self._failure: str | None = None
        self._listener: Callable[[], None] | None = None

    # For the caller.

    def cancel(self) -> None:
        """Ask the engine to drop the request at its next step. Has no effect on a finished request."""
        self.cancelled = True

    def result(self, timeout_s: float | None = None) -> Generation:
        """Wait until the request is finished. Raises EngineFailed, or TimeoutError after `timeout_s` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._done, timeout_s):
                raise TimeoutError(f"the request is not finished after {timeout_s} s")
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
                    self._changed.wait_for(lambda: bool(self._fresh) or self._done)
                fresh, done = self.take()
                yield from fresh
            self.raise_failure()
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        async for _, delta in stream_deltas([self]):
            yield delta

    def take(self) -> tuple[list[Delta], bool]:
        """The deltas that were not read yet, and whether they are the last."""
        with self._changed:
            fresh, self._fresh = self._fresh, []
            return fresh, self._done

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Have the engine's thread call `listener` whenever something changes."""
        with self._changed:
            self._listener = listener

    # For the engine.

    def add(self, delta: Delta) -> None:
        """Append a token. A delta with a finish_reason is the last."""
        with self._changed:
            self.token_ids.append(delta.token_id)
            self.text += delta.text
            self._fresh.append(delta)
            if delta.finish_reason is not None:
                self.finish_reason, self._done = delta.finish_reason, True
            self._notify()

    def end(self, failure: str | None = None) -> None:
        """Finish without another token: the request was cancelled, or failed for the reason `failure`."""
        with self._changed:
            if not self._done:
                self._failure = failure
                self.finish_reason = "cancelled" if failure is None else None
                self._done = True
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._listener is not None:
            try:
                self._listener()
            except RuntimeError:  # the reader's event loop is closed, so nobody reads any more
                self._listener = None
                self.cancel()


async def stream_deltas(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Delta], None]:
    """(index, delta) of several requests, as they come. Leaving early cancels them all. Raises EngineFailed."""
    loop, news = asyncio.get_running_loop(), asyncio.Event()
    for generation in generations:
        generation.listen(lambda: _wake(loop, news))
    try:
        unfinished = dict(enumerate(generations))
        while unfinished:
            news.clear()
            for index, generation in list(unfinished.items()):
                fresh, done = generation.take()
                for delta in fresh:
                    yield index, delta
                if done:
                    generation.raise_failure()
                    del unfinished[index]
            if unfinished:
                await news.wait()
    finally:
        for generation in generations:
            generation.listen(None)
            generation.cancel()


def _wake(loop: asyncio.AbstractEventLoop, news: asyncio.Event) -> None:
    loop.call_soon_threadsafe(news.set)
