"""Clients of the serving benchmarks: users in a closed loop and Poisson arrivals, over HTTP, with streams or whole answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import numpy as np


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens, and as text for servers that take no tokens."""

    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Load:
    """What is asked: prompts of equal length, and numbers of new tokens, both used in turn."""

    prompts: tuple[Prompt, ...]
    new_tokens: tuple[int, ...]

    def request(self, number: int) -> tuple[Prompt, int]:
        return self.prompts[number % len(self.prompts)], self.new_tokens[number % len(self.new_tokens)]


@dataclass(frozen=True)
class Target:
    """A server, the model's name there, and which fields it knows: OpenAI's and ours, or those of `transformers serve`."""

    url: str
    model: str
    fields: Literal["ours", "transformers"] = "ours"

    def body(self, prompt: Prompt, new_tokens: int, stream: bool) -> dict[str, Any]:
        """A request for exactly `new_tokens` greedy tokens."""
        shared = {"model": self.model, "max_tokens": new_tokens, "temperature": 0, "stream": stream}
        if self.fields == "transformers":
            generation = {"min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
            return {**shared, "prompt": prompt.text, "generation_config": json.dumps(generation)}
        options = {"stream_options": {"include_usage": True}} if stream else {}
        return {**shared, **options, "prompt": list(prompt.token_ids), "ignore_eos": True}


@dataclass(frozen=True)
class Asked:
    """When one request was sent, got its first token (not of a whole answer), and ended (seconds), and how many tokens it got."""

    sent: float
    first: float | None
    ended: float
    tokens: int


async def ask(session: aiohttp.ClientSession, target: Target, prompt: Prompt, new_tokens: int, stream: bool = True) -> Asked:
    """One request, read to its end."""
    sent, first, last = time.perf_counter(), None, b""
    async with session.post(f"{target.url}/v1/completions", json=target.body(prompt, new_tokens, stream)) as response:
        response.raise_for_status()
        if stream:
            async for line in response.content:
                if line.startswith(b"data: {"):  # the last of these has the token counts; others are not parsed, clients cost too
                    first = first or time.perf_counter()
                    last = line[6:]
        else:
            last = await response.read()
    tokens = (json.loads(last).get("usage") or {}).get("completion_tokens")
    if tokens != new_tokens:
        raise SystemExit(f"{target.url} gave {tokens} tokens of {new_tokens}")
    return Asked(sent, first, time.perf_counter(), tokens)


async def closed_loop(target: Target, load: Load, users: int, each: int, stream: bool = True) -> list[Asked]:
    """Every user asks `each` times, one request after the other."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def user(number: int) -> list[Asked]:
            return [await ask(session, target, *load.request(number * each + turn), stream) for turn in range(each)]

        return [one for many in await asyncio.gather(*(user(number) for number in range(users))) for one in many]


async def open_loop(target: Target, load: Load, arrivals: Sequence[float], stream: bool = True) -> list[Asked]:
    """Requests at given times (seconds from the start), whatever the server does."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def at(number: int, arrival: float) -> Asked:
            await asyncio.sleep(arrival)
            return await ask(session, target, *load.request(number), stream)

        return await asyncio.gather(*(at(number, arrival) for number, arrival in enumerate(arrivals)))


def times_of(asked: Sequence[Asked]) -> dict[str, Any]:
    """Throughput, time of a request, to its first token (TTFT) and per further token (TPOT)."""
    tokens, span_s = sum(one.tokens for one in asked), max(one.ended for one in asked) - min(one.sent for one in asked)
    lists = {
        "request_s": [one.ended - one.sent for one in asked],
        "ttft_ms": [1000 * (one.first - one.sent) for one in asked if one.first is not None],
        "tpot_ms": [
            1000 * (one.ended - one.first) / (one.tokens - 1) for one in asked if one.first is not None and one.tokens > 1
        ],
    }
    found: dict[str, Any] = {"requests": len(asked), "tokens": tokens, "tokens_per_s": tokens / span_s}
    for name, values in lists.items():
        if values:
            found |= {f"{name}_median": float(np.median(values)), f"{name}_p95": float(np.quantile(values, 0.95))}
    return found
