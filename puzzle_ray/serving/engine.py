"""A continuous-batching engine for one process (CPU or GPU) on a model's plain `forward()`.

Requests join and leave between two forward passes. Waiting requests are prefilled into free slots. Then one pass gives every running
request a token. Greedy tokens equal those of `model.generate(do_sample=False)` on each prompt alone.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from puzzle_ray.errors import ConfigError
from puzzle_ray.serving.generation import Delta, EngineBusy, EngineFailed, FinishReason, Generation
from puzzle_ray.serving.sampling import SamplingParams, choose_tokens
from puzzle_ray.serving.slots import DecodeMasks, SlotCache
from puzzle_ray.serving.text import TextStream
from puzzle_ray.surgery.kv_cache import continuing

_log = logging.getLogger(__name__)

# A prefill pass takes waiting prompts in order, as long as padding them to the longest one wastes at most this share.
_MAX_PADDING = 0.25


@dataclass(frozen=True)
class EngineStats:
    """Counters: what the engine does now, and what it has done since its start."""

    running: int
    waiting: int
    finished: int
    prompt_tokens: int
    generated_tokens: int
    forward_passes: int
    kv_cache_mib: float


@dataclass
class _Running:
    """A request in a slot. `length` positions of its row are filled. `token_id` is chosen, but not in the row yet."""

    generation: Generation
    text: TextStream
    draw: random.Random
    length: int
    token_id: int = 0
    finished: bool = False


class Engine:
    """Serves `model` to many requests at once. Use as a context manager, or `start()` and `close()`.

    max_batch_size: the number of slots, which is the number of requests decoded together.
    max_length: the tokens of prompt and answer that a slot holds. None is the model's own limit.
    max_waiting: the number of requests that may wait for a slot.
    max_prefill_tokens: the padded prompt tokens of one prefill pass. This bounds how long the running requests wait. A longer prompt
    has a pass of its own.

    Layers may differ in KV heads, and some may have no attention. Layers must keep nothing but keys and values. Raises ConfigError.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_batch_size: int = 16,
        max_length: int | None = None,
        max_waiting: int = 256,
        max_prefill_tokens: int = 4096,
    ) -> None:
        limit = _position_limit(model)
        if max_length is not None and not 2 <= max_length <= limit:
            raise ConfigError("max_length", f"is {max_length}", f"give 2 to {limit}, the model's own limit")
        if max_batch_size < 1 or max_waiting < 1:
            raise ConfigError("max_batch_size", f"is {max_batch_size}, max_waiting {max_waiting}", "give 1 or more")
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size
        self.max_length = max_length or limit
        self.max_waiting = max_waiting
        self.max_prefill_tokens = max_prefill_tokens
        self._model = model.eval()
        self._vocab_size: int = model.get_input_embeddings().weight.shape[0]
        self._eos_ids = _eos_ids(model)
        self._masks = DecodeMasks(model.config, model.dtype)
        self._cache = SlotCache(model.config.num_hidden_layers, max_batch_size, self.max_length)
        self._running: list[_Running] = []  # index = row of the cache
        self._waiting: deque[Generation] = deque()
        self._news = threading.Condition()  # guards _waiting, _closing and _failure
        self._closing = False
        self._failure: str | None = None
        self._finished = self._prompt_tokens = self._generated_tokens = 0
        self._forward_passes = -2  # the two passes of the trial below are not counted
        with torch.inference_mode():  # a trial allocates every layer's rows, so that a lack of memory shows here
            self._prefill_forward([[0]], first_row=0)
            self._decode_forward([0], [1])
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> Engine:
        """Start the engine's thread. Requests that were submitted before are served then."""
        self._thread.start()
        return self

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams | None = None) -> Generation:
        """Queue a request; returns at once. Raises ConfigError, EngineBusy or EngineFailed."""
        params = params or SamplingParams()
        self._check_fits(prompt_ids, params)
        generation = Generation(prompt_ids, params)
        with self._news:
            self.check()
            if len(self._waiting) >= self.max_waiting:
                raise EngineBusy(len(self._waiting))
            self._waiting.append(generation)
            self._news.notify()
        return generation

    def check(self) -> None:
        """Raise EngineFailed if the engine takes no more requests."""
        if self._failure is not None or self._closing:
            raise EngineFailed(self._failure or "the engine is closed")

    def stats(self) -> EngineStats:
        """Counters, read without stopping the engine."""
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            finished=self._finished,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            forward_passes=self._forward_passes,
            kv_cache_mib=self._cache.memory_mib,
        )

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop after the forward pass in progress. Unfinished requests get EngineFailed. Raises TimeoutError."""
        with self._news:
            self._closing = True
            self._news.notify()
        if not self._thread.is_alive():  # never started, or ended by a failure
            self._end_all("the engine is closed")
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the engine's forward pass did not end within {timeout_s} s")

    def _check_fits(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        if not prompt_ids:
            raise ConfigError("prompt", "is empty", "give at least one token")
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self._vocab_size:
            raise ConfigError("prompt", "holds a token id out of range", f"ids go from 0 to {self._vocab_size - 1}")
        room = self.max_length - len(prompt_ids)
        if room < 1:
            problem = f"has {len(prompt_ids)} tokens, and prompt and completion together may have {self.max_length}"
            raise ConfigError("prompt", problem, "shorten it")
        if params.max_tokens is not None and params.max_tokens > room:
            limit = f"together with the prompt's {len(prompt_ids)} tokens that is more than {self.max_length}"
            raise ConfigError("max_tokens", f"is {params.max_tokens}, {limit}", f"give at most {room}")

    # What the engine's thread does.

    def _run(self) -> None:
        reason = "the engine is closed"
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._admit()
                    self._decode()
        except Exception as error:  # every request gets this error, later ones too
            _log.exception("the engine stopped")
            reason = f"{type(error).__name__}: {error}"
        finally:
            self._end_all(reason)

    def _wait_for_work(self) -> bool:
        with self._news:
            self._news.wait_for(lambda: self._closing or self._waiting or self._running)
            return not self._closing

    def _end_all(self, reason: str) -> None:
        with self._news:
            self._failure = self._failure or reason
            left = [*(running.generation for running in self._running), *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for generation in left:
            generation.end(failure=reason)

    def _admit(self) -> None:
        """Prefill as many waiting requests as fit into the free slots and into one pass."""
        batch = self._next_batch()
        if not batch:
            return
        first_row = len(self._running)
        # They are registered before the forward pass, so that they get its failure too.
        self._running += [
            _Running(
                generation=generation,
                text=TextStream(self.tokenizer, generation.prompt_ids, generation.params.stop),
                draw=random.Random(generation.params.seed),
                length=len(generation.prompt_ids),
            )
            for generation in batch
        ]
        logits = self._prefill_forward([generation.prompt_ids for generation in batch], first_row)
        self._prompt_tokens += sum(len(generation.prompt_ids) for generation in batch)
        self._emit(self._running[first_row:], logits)
        self._retire()

    def _next_batch(self) -> list[Generation]:
        """The waiting requests of the next prefill pass, in order. Cancelled ones are dropped."""
        batch: list[Generation] = []
        longest = total = 0
        with self._news:
            while self._waiting and len(self._running) + len(batch) < self.max_batch_size:
                candidate = self._waiting[0]
                if not candidate.cancelled:
                    length = len(candidate.prompt_ids)
                    padded = max(longest, length) * (len(batch) + 1)
                    if batch and (padded > self.max_prefill_tokens or total + length < padded * (1 - _MAX_PADDING)):
                        break
                    longest, total = max(longest, length), total + length
                    batch.append(candidate)
                else:
                    candidate.end()
                    self._finished += 1
                self._waiting.popleft()
        return batch

    def _prefill_forward(self, prompts: Sequence[Sequence[int]], first_row: int) -> Tensor:
        """Fills rows of the cache from `first_row` on. Returns the logits after each prompt, `[B, vocab]`.

        Prompts are padded on the right. Causal attention does not look there, so no mask is needed.
        """
        device = self._model.device
        lengths = [len(prompt) for prompt in prompts]
        padded = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts]
        last = torch.tensor(lengths, device=device) - 1
        keep, which = last.unique(return_inverse=True)
        self._cache.begin_prefill(first_row)
        logits = self._forward(
            input_ids=torch.tensor(padded, device=device),
            position_ids=torch.arange(max(lengths), device=device).expand(len(prompts), -1),
            logits_to_keep=keep,
        )
        return logits[torch.arange(len(prompts), device=device), which]

    def _decode(self) -> None:
        """Gives every running request one more token."""
        for running in self._running:
            if running.generation.cancelled:
                running.generation.end()
                running.finished = True
        self._retire()
        if not self._running:
            return
        token_ids = [running.token_id for running in self._running]
        logits = self._decode_forward(token_ids, [running.length for running in self._running])
        for running in self._running:
            running.length += 1
        self._emit(self._running, logits)
        self._retire()

    def _decode_forward(self, token_ids: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Adds one token to each of rows 0..B-1, which hold `lengths` tokens. Returns the logits after it, `[B, vocab]`."""
        device = self._model.device
        positions, kv_length = torch.tensor(lengths, device=device), max(lengths) + 1
        self._cache.begin_decode(positions, kv_length)
        logits = self._forward(
            input_ids=torch.tensor(token_ids, device=device)[:, None],
            position_ids=positions[:, None],
            attention_mask=self._masks(positions, kv_length),
        )
        return logits[:, -1]

    def _forward(self, **inputs: object) -> Tensor:
        self._forward_passes += 1
        logits = self._model(**inputs, **continuing(self._cache)).logits
        assert isinstance(logits, Tensor)
        return logits

    def _emit(self, requests: Sequence[_Running], logits: Tensor) -> None:
        """Chooses a token for each request from its row of `logits`, and adds it to the request."""
        params = [running.generation.params for running in requests]
        draws = [running.draw.random() for running in requests]
        for running, token_id in zip(requests, choose_tokens(logits, params, draws), strict=True):
            if token_id is None:
                running.generation.end(failure="the model's logits are not a number")
                running.finished = True
                continue
            running.token_id = token_id
            delta = self._delta(running, token_id)
            running.finished = delta.finish_reason is not None
            running.generation.add(delta)
            self._generated_tokens += 1

    def _delta(self, running: _Running, token_id: int) -> Delta:
        params, text = running.generation.params, running.text
        new_tokens = running.length - len(running.generation.prompt_ids) + 1
        shown = text.push(token_id)
        reason: FinishReason | None = None
        if text.stopped or (token_id in self._eos_ids and not params.ignore_eos):
            reason = "stop"
        elif new_tokens == params.max_tokens or running.length + 1 >= self.max_length:
            reason = "length"
        if reason is not None and not text.stopped:
            shown += text.finish()
            if text.stopped:  # the last characters complete a stop string
                reason = "stop"
        return Delta(token_id, shown, reason)

    def _retire(self) -> None:
        """Drops finished requests. The last row moves into each freed row, so that the running requests stay in rows 0..n-1."""
        for row in range(len(self._running) - 1, -1, -1):
            if not self._running[row].finished:
                continue
            last = self._running.pop()
            if row < len(self._running):
                self._cache.move(source=len(self._running), target=row, length=last.length)
                self._running[row] = last
            self._finished += 1


def _position_limit(model: PreTrainedModel) -> int:
    """The number of tokens that the model has positions for."""
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        kind = model.config.model_type
        raise ConfigError("model", f"{kind} has no max_position_embeddings", "the engine serves models that take position ids")
    return limit


def _eos_ids(model: PreTrainedModel) -> frozenset[int]:
    """The end-of-text tokens at which `model.generate` stops."""
    config = model.generation_config
    eos = None if config is None else config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
