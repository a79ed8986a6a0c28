"""The server among careless clients: python -m benchmarks.serving_abuse --model FOLDER --out FILE.json

Many clients ask for a while. A third of the requests is left early; a tenth is garbage: bodies that are not JSON or of 10 MB, half
surrogate pairs, n=10**6, NaN, tiny and huge floats in every field. What is looked at: any status of 500 and above but 503, how much
slower sound requests get than without the others, the replica's memory, and whether all places are free at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from benchmarks.record import write
from benchmarks.serving import served

FLOATS = (5e-324, 1e-46, 1e-30, 1e30, 1e308, 3.4e38, float("nan"), float("inf"), float("-inf"), -0.0, -1e-300, 2.0, -2.0)
FIELDS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
MODEL = "m"


def garbage(draw: random.Random) -> bytes:
    """The body of a request that no careful client sends."""
    fields: dict[str, Any] = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8}
    kind = draw.randrange(8)
    if kind == 0:
        return bytes(draw.randrange(256) for _ in range(50))
    if kind == 1:
        return b'{"prompt": "' + b"a" * (10 << 20) + b'"}'
    if kind == 2:
        return b'{"model": "m", "prompt": "\\ud800 and more"}'
    if kind == 3:
        return b"[" * 100_000
    if kind == 4:
        fields |= {"n": 10**6, "best_of": 10**6}
    elif kind == 5:
        fields["logit_bias"] = {str(draw.choice([-1, 5, 10**9])): draw.choice(FLOATS)}
    elif kind == 6:
        fields["prompt"] = draw.choice([[10**30], [-1], [[]], "a b " * 100_000, {"a": 1}])
    else:
        fields |= {name: draw.choice(FLOATS) for name in FIELDS if draw.random() < 0.5}
    return json.dumps(fields).encode()


async def client(url: str, number: int, until: float, careless: bool, found: Counter[str], sound_s: list[float]) -> None:
    draw = random.Random(number)
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        while time.monotonic() < until:
            kind = draw.random() if careless else 1.0
            sound = {
                "model": MODEL,
                "prompt": "Once upon a time",
                "max_tokens": 16,
                "temperature": 0.8,
                "ignore_eos": True,
                "stream": True,
            }
            body = garbage(draw) if kind < 0.1 else json.dumps(sound).encode()
            leaves_after = draw.uniform(0.0, 0.5) if 0.1 <= kind < 0.1 + 1 / 3 else None
            began = time.perf_counter()
            try:
                async with asyncio.timeout(leaves_after):
                    async with session.post(f"{url}/v1/completions", data=body, headers=headers) as response:
                        await response.read()
                        found[f"{'garbage' if kind < 0.1 else 'sound'} {response.status}"] += 1
                        if response.status == 200 and kind >= 0.1 and leaves_after is None:
                            sound_s.append(time.perf_counter() - began)
                        elif response.status == 503:
                            await asyncio.sleep(float(response.headers.get("Retry-After", 1)))
            except TimeoutError:
                found["left early"] += 1
            except aiohttp.ClientError as error:  # a server that refuses 10 MB closes the connection before they are sent
                found[f"{'garbage' if kind < 0.1 else 'sound'} {type(error).__name__}"] += 1
            await asyncio.sleep(draw.uniform(0, 0.2))


def replica_mib() -> float:
    """Memory of the replica."""
    processes = psutil.Process().children(recursive=True)
    return max(p.memory_info().rss for p in processes if any("ServeReplica" in word for word in p.cmdline())) / 2**20


async def crowd(url: str, clients: int, seconds: float, careless: bool) -> dict[str, Any]:
    """Clients for a while."""
    found: Counter[str] = Counter()
    sound_s: list[float] = []
    memory = [replica_mib()]

    async def watch() -> None:
        while True:
            await asyncio.sleep(seconds / 10)
            memory.append(replica_mib())

    watcher = asyncio.create_task(watch())
    until = time.monotonic() + seconds
    await asyncio.gather(*(client(url, number, until, careless, found, sound_s) for number in range(clients)))
    watcher.cancel()
    return {
        "careless": careless, "clients": clients, "seconds": seconds, "answers": dict(sorted(found.items())),
        "sound_s_median": float(np.median(sound_s)), "sound_s_p95": float(np.quantile(sound_s, 0.95)), "replica_mib": memory,
    }  # fmt: skip


async def run(url: str, clients: int, seconds: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    await crowd(url, 8, 5.0, careless=True)  # warm
    rows = [await crowd(url, clients, min(seconds, 60.0), careless=False), await crowd(url, clients, seconds, careless=True)]
    async with aiohttp.ClientSession() as session:
        for _ in range(100):
            async with session.get(f"{url}/health") as response:
                state = (await response.json())["models"][MODEL]
            if state["running"] == state["waiting"] == 0:
                break
            await asyncio.sleep(0.1)
    calm, wild = rows
    bad = {name: count for row in rows for name, count in row["answers"].items() if name[-3:].isdigit() and int(name[-3:]) >= 500}
    return rows, {
        "server_errors_other_than_503": sum(count for name, count in bad.items() if not name.endswith("503")),
        "p95_among_careless_over_p95_alone": wild["sound_s_p95"] / calm["sound_s_p95"],
        "memory_growth_mib": wild["replica_mib"][-1] - wild["replica_mib"][len(wild["replica_mib"]) // 2],
        "places_free_at_the_end": state["running"] == state["waiting"] == 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=600.0)
    options = parser.parse_args()
    with served({MODEL: options.model}, threads=1, dtype="float32") as url:
        rows, summary = asyncio.run(run(url, options.clients, options.seconds))
    for row in rows:
        print(json.dumps(row, indent=1))
    print(json.dumps(summary, indent=1))
    write(options.out, rows, summary)


if __name__ == "__main__":
    main()
