"""The server under load, parent and child in one server, beside generate() and other servers: python -m benchmarks.serving --out FILE.json

Users in a closed loop (1, 4 and 16 of them: each asks again when its answer is there) and Poisson arrivals, over HTTP with streams. The
ways take turns, round after round, since the machine's speed drifts. `--other NAME=URL` adds a server that is running already on the
same checkpoint as the child (`transformers serve`, vLLM); one called vllm gives the summary's `server_over_vllm_16`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import ray
import torch
from ray import serve

from actors.serve import build
from benchmarks.record import write
from jobs.session import start_here
from puzzle_ray.artifacts import LayerChoice, Scenario
from puzzle_ray.models.child import choices_of, copy_tokenizer, load_model, new_child, read_config
from puzzle_ray.models.tokenizer import read_tokenizer
from puzzle_ray.process import compute_with
from puzzle_ray.profiling.measure import profile_serially
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.progress import Display
from puzzle_ray.search.tables import predicted_costs
from puzzle_ray.serving.settings import ServeSettings
from puzzle_ray.settings import DType
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

USERS = (1, 4, 16)
PARENT, CHILD = "parent", "child"


@dataclass(frozen=True)
class Load:
    """What is asked: prompts of equal length, and numbers of new tokens, both used in turn."""

    prompts: tuple[tuple[int, ...], ...]
    new_tokens: tuple[int, ...]

    def request(self, number: int) -> tuple[tuple[int, ...], int]:
        return self.prompts[number % len(self.prompts)], self.new_tokens[number % len(self.new_tokens)]


@dataclass(frozen=True)
class Asked:
    """When one request was sent, got its first token, and ended (seconds), and how many tokens it got."""

    sent: float
    first: float
    ended: float
    tokens: int


async def ask(session: aiohttp.ClientSession, url: str, model: str, prompt: Sequence[int], new_tokens: int) -> Asked:
    """One streamed request, read to its end."""
    body = {
        "model": model, "prompt": list(prompt), "max_tokens": new_tokens, "temperature": 0, "stream": True, "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    sent, first, tokens = time.perf_counter(), 0.0, 0
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                first = first or time.perf_counter()
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    if tokens != new_tokens:
        raise SystemExit(f"{url} gave {tokens} tokens of {new_tokens}")
    return Asked(sent, first, time.perf_counter(), tokens)


async def closed_loop(url: str, model: str, load: Load, users: int, each: int) -> list[Asked]:
    """Every user asks `each` times, one request after the other."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def user(number: int) -> list[Asked]:
            return [await ask(session, url, model, *load.request(number * each + turn)) for turn in range(each)]

        return [one for many in await asyncio.gather(*(user(number) for number in range(users))) for one in many]


async def open_loop(url: str, model: str, load: Load, arrivals: Sequence[float]) -> list[Asked]:
    """Requests at given times (seconds from the start), whatever the server does."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def at(number: int, arrival: float) -> Asked:
            await asyncio.sleep(arrival)
            return await ask(session, url, model, *load.request(number))

        return await asyncio.gather(*(at(number, arrival) for number, arrival in enumerate(arrivals)))


def row_of(way: str, pattern: str, asked: Sequence[Asked], cpu_s: float | None) -> dict[str, Any]:
    """Throughput, time to the first token (TTFT) and per further token (TPOT) of one run."""
    tokens, span_s = sum(one.tokens for one in asked), max(one.ended for one in asked) - min(one.sent for one in asked)
    ttft = [1000 * (one.first - one.sent) for one in asked]
    tpot = [1000 * (one.ended - one.first) / (one.tokens - 1) for one in asked if one.tokens > 1]
    return {
        "way": way, "pattern": pattern, "requests": len(asked), "tokens": tokens, "tokens_per_s": tokens / span_s,
        "ttft_ms_median": float(np.median(ttft)), "ttft_ms_p95": float(np.quantile(ttft, 0.95)),
        "tpot_ms_median": float(np.median(tpot)), "tpot_ms_p95": float(np.quantile(tpot, 0.95)),
        "engine_cpu_ms_per_token": None if cpu_s is None else 1000 * cpu_s / tokens,
    }  # fmt: skip


def generated(model: Any, load: Load, batch: int, number: int) -> dict[str, Any]:
    """`generate()` on full batches of requests that are there from the start."""
    tokens, cpu, began = 0, time.process_time(), time.perf_counter()
    for start in range(0, number, batch):
        wanted = [load.request(start + index) for index in range(min(batch, number - start))]
        tokens += _generate(model, wanted)
    took_s = time.perf_counter() - began
    return {
        "way": "generate()", "pattern": f"batch {batch}", "requests": number, "tokens": tokens, "tokens_per_s": tokens / took_s,
        "engine_cpu_ms_per_token": 1000 * (time.process_time() - cpu) / tokens,
    }  # fmt: skip


def generated_as_they_come(model: Any, load: Load, arrivals: Sequence[float], batch: int) -> dict[str, Any]:
    """`generate()` on arrivals: whatever waits, at most a batch of it, until the longest of them is done."""
    began, served, tokens, waits = time.perf_counter(), 0, 0, []
    while served < len(arrivals):
        now = time.perf_counter() - began
        there = sum(arrival <= now for arrival in arrivals[served : served + batch])
        if not there:
            time.sleep(max(0.0, arrivals[served] - now))
            continue
        tokens += _generate(model, [load.request(served + index) for index in range(there)])
        done = time.perf_counter() - began
        waits += [done - arrival for arrival in arrivals[served : served + there]]
        served += there
    return {
        "way": "generate()", "pattern": "poisson", "requests": served, "tokens": tokens,
        "tokens_per_s": tokens / (time.perf_counter() - began - arrivals[0]), "request_s_median": float(np.median(waits)),
    }  # fmt: skip


def _generate(model: Any, wanted: Sequence[tuple[Sequence[int], int]]) -> int:
    ids, most = torch.tensor([prompt for prompt, _ in wanted]), max(new for _, new in wanted)
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=most, min_new_tokens=most, pad_token_id=0
        )
    return sum(new for _, new in wanted)


def engine_cpu_s() -> float | None:
    """CPU time of the replica so far."""
    for process in psutil.Process().children(recursive=True):
        try:
            if any("ServeReplica" in word for word in process.cmdline()):
                times = process.cpu_times()
                return float(times.user + times.system)
        except psutil.Error:
            continue
    return None


@asynccontextmanager
async def served(models: dict[str, str], threads: int, dtype: DType) -> AsyncIterator[str]:
    """One server with these models, on a Ray of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_here(num_cpus=threads + 1, object_store_memory=256 << 20)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
    settings = ServeSettings(models=models, num_cpus=threads, dtype=dtype, max_batch_size=16, prefix_cache=False)
    await asyncio.to_thread(serve.run, build(settings), name="benchmark")
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def predicted_speedup(config: Any, choices: Sequence[LayerChoice], scenario: Scenario, dtype: DType, repeats: int) -> float:
    """Throughput of the child over the parent's, by a profile of the shapes they are made of."""
    names = {kind: tuple(dict.fromkeys(choice.variant(kind) for choice in choices)) for kind in ("attention", "ffn")}  # type: ignore[arg-type]
    space = search_space(config, ("noop", *names["attention"]), ("noop", *names["ffn"]), 8)
    settings = ProfileConfig(scenario=scenario, dtype=dtype, repeats=repeats)
    with tempfile.TemporaryDirectory() as folder:
        profile = profile_serially(config, space, settings, Store(folder).artifact("profile", {}, {}), Display())
    child, parent = (
        predicted_costs(space, profile, scenario, each).throughput_tokens_per_s
        for each in (tuple(choices), (LayerChoice(),) * config.num_hidden_layers)
    )
    return child / parent


def random_child(parent: Path, folder: Path) -> None:
    """A child of the parent's shapes with random weights, about half of its blocks smaller: only shapes cost."""
    config = read_config(parent)
    width = config.intermediate_size // 16 * 8
    smaller = [LayerChoice("gqa:1", f"ffn:{width}"), LayerChoice("noop", "parent"), LayerChoice("gqa:1", "noop")]
    choices = [smaller[index // 2 % 3] if index % 2 else LayerChoice() for index in range(config.num_hidden_layers)]
    new_child(config, choices, torch.float32).save_pretrained(folder)
    copy_tokenizer(parent, folder)


async def measured(
    models: dict[str, str], others: dict[str, str], load: Load, mixed: Load, options: argparse.Namespace
) -> AsyncIterator[list[dict[str, Any]]]:
    """All ways in turn, `rounds` times: the rows so far, after every round."""
    rows: list[dict[str, Any]] = []
    reference = load_model(models[CHILD], getattr(torch, options.dtype))
    async with served(models, options.threads, options.dtype) as url:
        ways = {
            PARENT: (url, PARENT),
            CHILD: (url, CHILD),
            **{name: (other, options.other_model or CHILD) for name, other in others.items()},
        }
        for where, model in ways.values():
            await closed_loop(where, model, load, 2, 1)  # warm
        rate = options.rate
        for turn in range(options.rounds):
            for users in USERS:
                for name, (where, model) in sorted(ways.items(), key=lambda item: (turn % 2 == 0) == (item[0] == PARENT)):
                    before = engine_cpu_s()
                    asked = await closed_loop(where, model, load, users, max(1, options.requests // max(4, users)))
                    after = engine_cpu_s() if name in (PARENT, CHILD) else None
                    cpu_s = None if after is None or before is None else after - before
                    rows.append(row_of(name, f"{users} users", asked, cpu_s) | {"round": turn})
                    print(_line(rows[-1]), flush=True)
            if not rate:  # so much that neither way keeps up: what they get done is compared
                fastest = max(row["tokens_per_s"] for row in rows if row["way"] == CHILD)
                rate = 1.5 * fastest / (sum(mixed.new_tokens) / len(mixed.new_tokens))
            rows.append(generated(reference, load, 16, max(16, options.requests // 16 * 16)) | {"round": turn})
            print(_line(rows[-1]), flush=True)
            draw = random.Random(turn)
            arrivals = np.cumsum([draw.expovariate(rate) for _ in range(2 * options.requests)]).tolist()
            asked = await open_loop(url, CHILD, mixed, arrivals)
            rows.append(row_of(CHILD, "poisson", asked, None) | {"round": turn, "requests_per_s": rate})
            print(_line(rows[-1]), flush=True)
            rows.append(generated_as_they_come(reference, mixed, arrivals, 16) | {"round": turn, "requests_per_s": rate})
            print(_line(rows[-1]), flush=True)
            yield rows


def _line(row: dict[str, Any]) -> str:
    times = " ".join(
        f"{name} {row[name]:.1f}" for name in ("ttft_ms_median", "ttft_ms_p95", "tpot_ms_median", "tpot_ms_p95") if name in row
    )
    return f"{row['round']} {row['way']:>12} {row['pattern']:>9} {row['tokens_per_s']:9.1f} tokens/s  {times}"


def summary_of(rows: Sequence[dict[str, Any]], predicted: float) -> dict[str, Any]:
    """Ratios within a round, where the machine is the same for both; the median over rounds."""

    def ratio(one: tuple[str, str], other: tuple[str, str], value: str = "tokens_per_s") -> float | None:
        found = {(row["way"], row["pattern"], row["round"]): row.get(value) for row in rows}
        rounds = sorted({row["round"] for row in rows})
        pairs = [(found.get((*one, turn)), found.get((*other, turn))) for turn in rounds]
        return float(np.median([a / b for a, b in pairs if a and b])) if any(a and b for a, b in pairs) else None

    child = (CHILD, "16 users")
    return {
        "child_over_parent_16": ratio(child, (PARENT, "16 users")),
        "child_over_parent_16_by_cpu_time": ratio((PARENT, "16 users"), child, "engine_cpu_ms_per_token"),
        "predicted_speedup": predicted,
        "server_over_generate_b16": ratio(child, ("generate()", "batch 16")),
        "server_over_generate_b16_by_cpu_time": ratio(("generate()", "batch 16"), child, "engine_cpu_ms_per_token"),
        "server_over_generate_poisson": ratio((CHILD, "poisson"), ("generate()", "poisson")),
        "server_over_vllm_16": ratio(child, ("vllm", "16 users")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parent", type=Path, required=True, help="a model folder with a tokenizer")
    parser.add_argument("--child", type=Path, help="its child; without it one of random weights is made")
    parser.add_argument("--text", type=Path, required=True, help="what prompts are cut from")
    parser.add_argument("--other", action="append", default=[], help="NAME=URL of another server")
    parser.add_argument("--other-model", help="what other servers call the checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64, help="of one run; a quarter for a user alone, twice as many arrive")
    parser.add_argument("--rate", type=float, default=0.0, help="Poisson arrivals a second; 0: 1.5 x what the child can do")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all ways, and of the profile")
    parser.add_argument("--quick", action="store_true", help="one round of 16 requests")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.requests = 1, 16
    compute_with(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        child = options.child or Path(folder) / "child"
        if options.child is None:
            random_child(options.parent, child)
        config, text = read_config(options.parent), options.text.read_text(encoding="utf-8")[:2_000_000]
        ids = read_tokenizer(options.parent)(text)["input_ids"]
        length, draw = options.prompt_tokens, random.Random(0)
        prompts = tuple(tuple(ids[start : start + length]) for start in range(0, min(len(ids), 64 * length), length))
        most = options.new_tokens
        mixed = Load(
            prompts, tuple(draw.choice([most // 8, most // 4, most // 2, most, 2 * most]) for _ in range(options.requests))
        )
        scenario = Scenario(16, length, most)
        predicted = predicted_speedup(config, choices_of(read_config(child)), scenario, options.dtype, 5)
        print(f"predicted speedup {predicted:.3f}", flush=True)
        models, others = {PARENT: str(options.parent), CHILD: str(child)}, dict(each.split("=", 1) for each in options.other)

        async def run() -> None:
            async for rows in measured(models, others, Load(prompts, (most,)), mixed, options):
                summary = summary_of(rows, predicted)
                write(options.out, rows, summary)
            print(json.dumps(summary, indent=1))

        asyncio.run(run())


if __name__ == "__main__":
    main()
