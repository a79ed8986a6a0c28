"""A continuous-batching engine for one process (CPU or GPU) on a model's plain `forward()`.

Requests join and leave between two forward passes. A waiting prompt is read in pieces, and between two pieces every running request gets
a token. Greedy tokens equal those of `model.generate(do_sample=False)` on each prompt alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from types import TracebackType

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from puzzle_ray.errors import ConfigError
from puzzle_ray.serving.generation import EngineFailed, Generation
from puzzle_ray.serving.limits import TooLong, check_length, free_memory_bytes
from puzzle_ray.serving.metrics import EngineMetrics
from puzzle_ray.serving.output import Output
from puzzle_ray.serving.prefixes import PrefixCache
from puzzle_ray.serving.rows import Rows
from puzzle_ray.serving.sampling import SamplingParams
from puzzle_ray.serving.scheduler import Scheduler
from puzzle_ray.serving.sequences import Sequence
from puzzle_ray.serving.text import TextStream, special_token_ids
from puzzle_ray.serving.waiting import Waiting

_log = logging.getLogger(__name__)

_PREFIX_SHARE = 0.25  # of the key-value memory, for beginnings that later requests may share


@dataclass(frozen=True)
class EngineStats:
    """Counters: what the engine does now, and what it has done since its start."""

    running: int
    waiting: int
    finished: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    forward_passes: int
    preemptions: int
    kv_tokens: int
    kv_capacity_tokens: int
    kv_cache_mib: float


class Engine:
    """Serves `model` to many requests at once. Use as a context manager, or `start()` and `close()`.

    max_batch_size: the number of requests decoded together.
    max_length: the tokens of prompt and answer that a request may have. None is the model's own limit, or less where memory is short.
    max_waiting: the number of requests that may wait.
    prefill_tokens: the padded prompt tokens of one prefill pass. This bounds how long the running requests wait for their next token.
    kv_cache_mib: memory for keys and values. It is taken as requests need it. None: a share of what is free.
    prefix_cache: whether a quarter of that memory keeps the beginnings of earlier requests, for later ones that begin alike.
    stall_timeout_s: `check` fails where a forward pass takes longer.

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
        prefill_tokens: int = 512,
        kv_cache_mib: float | None = None,
        prefix_cache: bool = True,
        stall_timeout_s: float = 300.0,
    ) -> None:
        if min(max_batch_size, max_waiting, prefill_tokens) < 1:
            problem = f"is {max_batch_size}, max_waiting {max_waiting}, prefill_tokens {prefill_tokens}"
            raise ConfigError("max_batch_size", problem, "give 1 or more")
        length = check_length(model.config, max_length)
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size
        self.max_waiting = max_waiting
        self.metrics = EngineMetrics()
        self.vocab_size: int = model.get_input_embeddings().weight.shape[0]
        self._rows = Rows(model, max_batch_size, length)
        self.max_length = self._divide_memory(model.device, length, max_length is not None, kv_cache_mib, prefix_cache)
        self._waiting = Waiting(max_waiting)
        self._output = Output(self.metrics)
        self._special_ids, self._eos_ids = special_token_ids(tokenizer), eos_ids(model)
        self._scheduler = Scheduler(
            self._rows, self._prefixes, self._waiting, self._output, max_rows=max_batch_size, max_length=self.max_length,
            prefill_tokens=prefill_tokens, eos_ids=self._eos_ids, vocab_size=self.vocab_size, device=model.device,
        )  # fmt: skip
        self._stall_timeout_s = stall_timeout_s
        self._closing = False
        self._beat = time.monotonic()  # when the engine's thread was last seen at work, or got work
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def make_room(self, num_requests: int, length: int) -> bool:
        """Takes memory for so many requests of `length` tokens now, before the start. Returns False where there is none for them."""
        return self._rows.room(num_requests, length)

    def start(self) -> Engine:
        """Start the engine's threads. Requests that were submitted before are served then."""
        self._beat = time.monotonic()
        self._output.start()
        self._thread.start()
        return self

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def submit(self, prompt_ids: SequenceOf[int], params: SamplingParams | None = None) -> Generation:
        """Queue a request; returns at once. Raises ConfigError, EngineBusy or EngineFailed."""
        return self.submit_all([(prompt_ids, params or SamplingParams())])[0]

    def submit_all(self, requests: SequenceOf[tuple[SequenceOf[int], SamplingParams]]) -> list[Generation]:
        """Queue several requests, all of them or none; returns at once. Raises ConfigError, EngineBusy or EngineFailed."""
        self.check_number(len(requests))
        for prompt_ids, params in requests:
            self._check_fits(prompt_ids, params)
        generations = [Generation(ids, params, self._text_stream(ids, params)) for ids, params in requests]
        if not self._scheduler.running and not len(self._waiting):
            self._beat = time.monotonic()
        self._waiting.add([Sequence(generation, self.max_length) for generation in generations])
        return generations

    def _text_stream(self, prompt_ids: SequenceOf[int], params: SamplingParams) -> TextStream:
        """The token that ends an answer is no part of its text, whether the tokenizer calls it special or not."""
        hidden = self._special_ids.union(() if params.ignore_eos else self._eos_ids, params.stop_token_ids)
        return TextStream(self.tokenizer, prompt_ids, params.stop, hidden)

    def check_number(self, number: int) -> None:
        """Raise ConfigError if so many requests can never be submitted together."""
        if number > self.max_waiting:
            problem = f"asks for {number} answers, and at most {self.max_waiting} may wait here"
            raise ConfigError("prompt", problem, "send several requests, with fewer prompts or a smaller n")

    def check(self) -> None:
        """Raise EngineFailed if the engine takes no more requests, or does not get on with those it has."""
        self._waiting.check()
        at_work = self._thread.is_alive() and (self._scheduler.running or len(self._waiting))
        silent_s = time.monotonic() - self._beat
        if at_work and silent_s > self._stall_timeout_s:
            raise EngineFailed(f"a forward pass has not ended after {silent_s:.0f} s")
        if self._thread.is_alive() and not self._output.alive:
            raise EngineFailed("the thread that makes text has ended")

    def stats(self) -> EngineStats:
        """Counters, read without stopping the engine."""
        done = self._scheduler
        return EngineStats(
            running=done.running,
            waiting=len(self._waiting),
            finished=done.finished,
            prompt_tokens=done.prompt_tokens,
            cached_tokens=done.cached_tokens,
            generated_tokens=done.generated_tokens,
            forward_passes=self._rows.forward_passes,
            preemptions=done.preemptions,
            kv_tokens=done.kv_tokens,
            kv_capacity_tokens=self._rows.capacity_tokens,
            kv_cache_mib=self._rows.cache.memory_mib + self._prefixes.tokens * self._rows.cache.bytes_per_token / 2**20,
        )

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop after the forward pass in progress. Unfinished requests get EngineFailed. Raises TimeoutError."""
        self._closing = True
        self._waiting.close("the engine is closed")
        if not self._thread.is_alive():  # never started, or ended by a failure
            self._end_all("the engine is closed")
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the engine's forward pass did not end within {timeout_s} s")
        self._output.close(timeout_s)

    def _divide_memory(
        self, device: torch.device, length: int, is_asked: bool, kv_cache_mib: float | None, prefix_cache: bool
    ) -> int:
        """Says how many tokens rows and prefixes may hold. Returns the longest request's number. Raises ConfigError."""
        bytes_per_token = self._rows.cache.bytes_per_token
        budget = free_memory_bytes(device) if kv_cache_mib is None else int(kv_cache_mib * 2**20)
        tokens = budget // bytes_per_token if bytes_per_token else 2 * self.max_batch_size * length
        for_prefixes = int(tokens * _PREFIX_SHARE) if prefix_cache else 0
        for_rows = tokens - for_prefixes
        if for_rows < length and (is_asked or for_rows < 2):
            problem = f"{budget / 2**20:.1f} MiB hold {for_rows} tokens, and max_length is {length}"
            need_mib = length * bytes_per_token / 2**20 / (1 - _PREFIX_SHARE * prefix_cache)
            raise ConfigError("kv_cache_mib", problem, f"give {need_mib:.0f} or more, or a smaller max_length")
        longest = min(length, for_rows)
        if longest < length:
            _log.warning(
                "the key-value memory of %.0f MiB limits requests to %d tokens; the model has %d", budget / 2**20, longest, length
            )
        self._rows.limit(longest, for_rows)
        self._prefixes = PrefixCache(self._rows.cache, min(for_prefixes, self.max_batch_size * longest))
        return longest

    def _check_fits(self, prompt_ids: SequenceOf[int], params: SamplingParams) -> None:
        if not prompt_ids:
            raise ConfigError("prompt", "is empty", "give at least one token")
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self.vocab_size:
            raise ConfigError("prompt", "holds a token id out of range", f"ids go from 0 to {self.vocab_size - 1}")
        for name, ids in (
            ("logit_bias", [token_id for token_id, _ in params.logit_bias]),
            ("stop_token_ids", params.stop_token_ids),
        ):
            if not all(0 <= token_id < self.vocab_size for token_id in ids):
                raise ConfigError(name, "holds a token id out of range", f"ids go from 0 to {self.vocab_size - 1}")
        room = self.max_length - len(prompt_ids)
        if room < (0 if params.max_tokens == 0 else 1):
            limit = f"this model's maximum context length is {self.max_length} tokens, prompt and completion together"
            raise TooLong("prompt", f"has {len(prompt_ids)} tokens, and {limit}", "shorten it")
        if params.max_tokens is not None and params.max_tokens > room:
            limit = f"with the prompt's {len(prompt_ids)} tokens this model's maximum context length is {self.max_length}"
            raise TooLong("max_tokens", f"is {params.max_tokens}, and {limit}", f"give at most {room}")

    # What the engine's thread does.

    def _run(self) -> None:
        reason = "the engine is closed"
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._scheduler.step()
                    self._beat = time.monotonic()
        except Exception as error:  # every request gets this error, later ones too
            _log.exception("the engine stopped")
            reason = f"{type(error).__name__}: {error}"
        finally:
            self._end_all(reason)

    def _wait_for_work(self) -> bool:
        if not self._scheduler.running:
            with self._waiting.changed:
                self._waiting.changed.wait_for(lambda: self._closing or len(self._waiting))
        return not self._closing

    def _end_all(self, reason: str) -> None:
        self._waiting.close(reason)
        self._scheduler.end_all(reason)
        for sequence in self._waiting.empty():
            self._output.end(sequence.generation, reason)


def eos_ids(model: PreTrainedModel) -> frozenset[int]:
    """The end-of-text tokens at which `model.generate` stops."""
    config = model.generation_config
    eos = None if config is None else config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
