"""The server under load, parent and child in one server, beside generate() and other servers: python -m benchmarks.serving --out FILE.json

- Users in a closed loop, over HTTP: 1, 4 and 16 of them, each of which asks again when its answer is there. Answers are streamed; 16 users
  also ask for whole answers, as `generate()` gives them.
- `generate()` on batches of 16 requests that are there from the start.
- Poisson arrivals, more than any way can serve, of answers whose lengths are drawn from an exponential distribution. The server gets
  them as they come. `generate()` gets the same in the same order: in static batches of whatever waits, at most 16, which end with their
  longest answer, and one at a time (the first quarter of them).
- `transformers serve` with the parent's checkpoint (it loads no class of which transformers does not know): `--transformers-serve`.
- A server that runs already on the same checkpoint as the child: `--other NAME=URL`. One called vllm gives `server_over_vllm_16`.

The ways take turns, round after round, since the machine's speed drifts. CPU time is told apart: replica (which listens itself, as
`serve-child` has it), Serve's proxy where RAY_SERVE_ENABLE_HA_PROXY=0 asks for it, and client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from ray import serve

from actors.direct_http import Where, listens_itself
from actors.serve import application, start_serve
from benchmarks.record import write
from benchmarks.serving_clients import Asked, Load, Prompt, Target, closed_loop, open_loop, times_of
from jobs.session import SERVE_ENVIRONMENT, start_here, unless_set
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
BATCH = 16
PARENT, CHILD, GENERATE, TRANSFORMERS = "parent", "child", "generate()", "transformers serve"
PROCESSES = {PARENT: "ServeReplica", CHILD: "ServeReplica", TRANSFORMERS: "transformers.cli"}  # words of their command lines
WHOLE, STATIC, SINGLE = "16 users, whole answers", "poisson, static batches", "poisson, one at a time"


def generated(model: Any, load: Load, number: int) -> dict[str, Any]:
    """`generate()` on full batches of requests that are there from the start."""
    tokens, cpu, began = 0, time.process_time(), time.perf_counter()
    for start in range(0, number, BATCH):
        tokens += _generate(model, [load.request(start + index) for index in range(min(BATCH, number - start))])
    took_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    return {
        "requests": number,
        "tokens": tokens,
        "tokens_per_s": tokens / took_s,
        "engine_cpu_ms_per_token": 1000 * cpu_s / tokens,
    }


def generated_as_they_come(model: Any, load: Load, arrivals: Sequence[float], batch: int) -> dict[str, Any]:
    """`generate()` on arrivals: whatever waits, at most a batch of it, until the longest of them is done."""
    cpu, began, served, tokens, waits = time.process_time(), time.perf_counter(), 0, 0, []
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
        "requests": served, "tokens": tokens, "tokens_per_s": tokens / (time.perf_counter() - began - arrivals[0]),
        "request_s_median": float(np.median(waits)), "request_s_p95": float(np.quantile(waits, 0.95)),
        "engine_cpu_ms_per_token": 1000 * (time.process_time() - cpu) / tokens,
    }  # fmt: skip


def _generate(model: Any, wanted: Sequence[tuple[Prompt, int]]) -> int:
    """One batch, to the longest of its answers. Returns the number of tokens that were asked for."""
    ids, most = torch.tensor([prompt.token_ids for prompt, _ in wanted]), max(new for _, new in wanted)
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=most, min_new_tokens=most, pad_token_id=0
        )
    return sum(new for _, new in wanted)


def cpu_s(word: str) -> float:
    """CPU time so far of the processes under this one whose command line has `word`."""
    used = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            if any(word in part for part in process.cmdline()):
                used += _process_cpu_s(process)
        except (psutil.Error, OSError):
            continue
    return used


def _process_cpu_s(process: psutil.Process) -> float:
    """To the nanosecond where the kernel says so (of threads that live), for short turns; `cpu_times` counts in hundredths."""
    files = list(Path(f"/proc/{process.pid}/task").glob("*/schedstat"))
    if files:
        return sum(int(file.read_text().split()[0]) for file in files) / 1e9
    times = process.cpu_times()
    return float(times.user + times.system)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(models: dict[str, str], threads: int, dtype: DType) -> Iterator[str]:
    """One server with these models, on a Ray of its own, as `serve-child` starts it."""
    where = Where("127.0.0.1", free_port())
    with unless_set(SERVE_ENVIRONMENT):
        start_here(num_cpus=threads + 1, object_store_memory=256 << 20)
    settings = ServeSettings(models=models, num_cpus=threads, dtype=dtype, max_batch_size=BATCH, prefix_cache=False)
    itself = listens_itself(settings)
    start_serve(where.host, where.port, proxied=not itself)
    serve.run(application(settings, where if itself else None), name="benchmark")
    try:
        yield f"http://{where.host}:{where.port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@contextmanager
def transformers_serve(python: str, model: Path, threads: int, dtype: DType) -> Iterator[Target]:
    """transformers' own server with a model, in a process of its own."""
    port, start = free_port(), "from transformers.cli.transformers import app; app()"
    options = ["--device", "cpu", "--dtype", dtype, "--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([python, "-c", start, "serve", str(model), *options], env=environment)
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 180.0
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError) as error:
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"transformers serve did not start ({error})") from None
                time.sleep(0.5)
        yield Target(url, str(model), "transformers")
    finally:
        process.terminate()
        process.wait(30)


def predicted_speedup(
    config: Any, choices: Sequence[LayerChoice], scenario: Scenario, dtype: DType, repeats: int, request_ms: float
) -> float:
    """Throughput of the child over the parent's, by engine `puzzle`'s profile of the shapes they are made of."""
    names = {kind: tuple(dict.fromkeys(choice.variant(kind) for choice in choices)) for kind in ("attention", "ffn")}  # type: ignore[arg-type]
    space = search_space(config, ("noop", *names["attention"]), ("noop", *names["ffn"]), 8)
    settings = ProfileConfig(engine="puzzle", scenario=scenario, dtype=dtype, repeats=repeats, request_ms=request_ms)
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


def timed(run: Callable[[], Sequence[Asked]], process: str | None) -> dict[str, Any]:
    """What clients saw, and CPU time per token of the engine's process and Serve's proxy (None: they are not ours) and of the clients."""
    words = {} if process is None else {"engine": process, "proxy": "ProxyActor"}
    before, client = {name: cpu_s(word) for name, word in words.items()}, time.process_time()
    seen = times_of(run())
    used = {"client": time.process_time() - client, **{name: cpu_s(word) - before[name] for name, word in words.items()}}
    return {**seen, **{f"{name}_cpu_ms_per_token": 1000 * value / seen["tokens"] for name, value in used.items()}}


class Bench:
    """The ways, and what was measured of them so far."""

    def __init__(self, targets: dict[str, Target], model: Any, load: Load, mixed: Load, options: argparse.Namespace) -> None:
        self.targets, self.model, self.load, self.mixed = targets, model, load, mixed
        self.requests, self.num_arrivals, self.rate = options.requests, options.arrivals, options.rate
        self.only_batches: bool = options.only_batches
        self.rows: list[dict[str, Any]] = []

    def round(self, turn: int) -> None:
        """All ways once."""
        names = [CHILD] if self.only_batches else list(self.targets)
        for users in USERS[-1:] if self.only_batches else USERS:
            for name in names if turn % 2 else reversed(names):
                self._note(turn, name, f"{users} users", self._users(name, users, stream=True))
        self._note(turn, CHILD, WHOLE, self._users(CHILD, BATCH, stream=False))
        self._note(turn, GENERATE, f"batch {BATCH}", generated(self.model, self.load, max(BATCH, self.requests // BATCH * BATCH)))
        if not self.only_batches:
            self._arrivals(turn)

    def _arrivals(self, turn: int) -> None:
        if not self.rate:  # so much that no way keeps up: what they get done is compared
            fastest = max(row["tokens_per_s"] for row in self.rows if row["way"] == CHILD)
            self.rate = 1.5 * fastest / (sum(self.mixed.new_tokens) / len(self.mixed.new_tokens))
        draw = random.Random(turn)
        arrivals = np.cumsum([draw.expovariate(self.rate) for _ in range(self.num_arrivals)]).tolist()
        child, few = self.targets[CHILD], arrivals[: max(1, self.num_arrivals // 4)]
        for pattern, stream in (("poisson", True), ("poisson, whole answers", False)):
            seen = timed(partial(asyncio.run, open_loop(child, self.mixed, arrivals, stream)), PROCESSES[CHILD])
            self._note(turn, CHILD, pattern, seen)
        self._note(turn, GENERATE, STATIC, generated_as_they_come(self.model, self.mixed, arrivals, BATCH))
        self._note(turn, GENERATE, SINGLE, generated_as_they_come(self.model, self.mixed, few, 1))

    def _users(self, name: str, users: int, stream: bool) -> dict[str, Any]:
        target = self.targets[name]
        each = max(1, self.requests // max(USERS[1], users) // (1 if target.fields == "ours" else 4))
        return timed(partial(asyncio.run, closed_loop(target, self.load, users, each, stream)), PROCESSES.get(name))

    def _note(self, turn: int, way: str, pattern: str, found: dict[str, Any]) -> None:
        row = {"way": way, "pattern": pattern, "round": turn, **found}
        self.rows.append(row | ({"requests_per_s": self.rate} if "poisson" in pattern else {}))
        told = (
            "engine_cpu_ms_per_token",
            "proxy_cpu_ms_per_token",
            "client_cpu_ms_per_token",
            "ttft_ms_median",
            "tpot_ms_median",
        )
        numbers = " ".join(f"{name.removesuffix('_per_token')} {row[name]:.3g}" for name in told if name in row)
        print(f"{turn} {way:>12} {pattern:>24} {row['tokens_per_s']:9.1f} tokens/s  {numbers}", flush=True)


def summary_of(rows: Sequence[dict[str, Any]], predicted: float | None) -> dict[str, Any]:
    """Ratios within a round, where the machine is the same for both; the median over rounds."""
    found = {(row["way"], row["pattern"], row["round"]): row for row in rows}
    rounds = sorted({row["round"] for row in rows})

    def ratio(one: tuple[str, str], other: tuple[str, str], by_cpu: bool = False) -> float | None:
        """How much faster `one` is. By CPU time: of the engine's process, without Serve's proxy and clients."""
        pairs = [(found.get((*one, turn)), found.get((*other, turn))) for turn in rounds]
        if by_cpu:
            ratios = [b["engine_cpu_ms_per_token"] / a["engine_cpu_ms_per_token"] for a, b in pairs if a and b]
        else:
            ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs if a and b]
        return float(np.median(ratios)) if ratios else None

    child, full, static = (CHILD, "16 users"), (GENERATE, f"batch {BATCH}"), (GENERATE, STATIC)
    compared = {
        "child_over_parent_16": (child, (PARENT, "16 users")),
        "server_over_generate_b16": ((CHILD, WHOLE), full),
        "server_over_generate_b16_streamed": (child, full),
        "server_over_generate_poisson": ((CHILD, "poisson, whole answers"), static),
        "server_over_generate_poisson_streamed": ((CHILD, "poisson"), static),
        "server_over_generate_one_at_a_time_poisson": ((CHILD, "poisson, whole answers"), (GENERATE, SINGLE)),
        "parent_over_transformers_serve_16": ((PARENT, "16 users"), (TRANSFORMERS, "16 users")),
        "server_over_vllm_16": (child, ("vllm", "16 users")),
    }
    summary = {name: ratio(*pair) for name, pair in compared.items()}
    by_cpu = {f"{name}_by_cpu_time": ratio(*pair, by_cpu=True) for name, pair in compared.items() if "vllm" not in name}
    return {**summary, **by_cpu, "predicted_speedup": predicted}


def loads(parent: Path, text: Path, options: argparse.Namespace) -> tuple[Load, Load]:
    """Answers of equal lengths, and of lengths drawn from an exponential distribution."""
    tokenizer, length, draw = read_tokenizer(parent), options.prompt_tokens, random.Random(0)
    ids = tokenizer(text.read_text(encoding="utf-8")[:2_000_000])["input_ids"]
    starts = range(0, min(len(ids), 64 * length) - length + 1, length)
    pieces = [tuple(ids[start : start + length]) for start in starts]
    prompts = tuple(Prompt(piece, tokenizer.decode(piece, skip_special_tokens=True)) for piece in pieces)
    mean, most = options.poisson_tokens, read_config(parent).max_position_embeddings - length
    drawn = tuple(min(max(8, round(draw.expovariate(1 / mean))), 6 * mean, most) for _ in range(options.arrivals))
    return Load(prompts, (options.new_tokens,)), Load(prompts, drawn)


def measure(child: Path, options: argparse.Namespace) -> None:
    """All rounds; what is known is written after each."""
    config, (load, mixed) = read_config(options.parent), loads(options.parent, options.text, options)
    scenario = Scenario(BATCH, options.prompt_tokens, options.new_tokens)
    predicted = None  # the profile that it takes is for the comparison of parent and child
    if not options.only_batches:
        choices = choices_of(read_config(child))
        predicted = predicted_speedup(config, choices, scenario, options.dtype, 5, options.request_ms)
        print(f"predicted speedup {predicted:.3f}", flush=True)
    reference = load_model(child, getattr(torch, options.dtype))
    with ExitStack() as stack:
        url = stack.enter_context(served({PARENT: str(options.parent), CHILD: str(child)}, options.threads, options.dtype))
        targets = {PARENT: Target(url, PARENT), CHILD: Target(url, CHILD)}
        targets |= {
            name: Target(other, options.other_model or CHILD) for name, other in (each.split("=", 1) for each in options.other)
        }
        if options.transformers_serve:
            targets[TRANSFORMERS] = stack.enter_context(
                transformers_serve(options.transformers_serve, options.parent, options.threads, options.dtype)
            )
        for target in targets.values():
            asyncio.run(closed_loop(target, load, 2, 1))  # warm
        bench = Bench(targets, reference, load, mixed, options)
        for turn in range(options.rounds):
            bench.round(turn)
            summary = summary_of(bench.rows, predicted)
            write(options.out, bench.rows, summary)
    print(json.dumps(summary, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parent", type=Path, required=True, help="a model folder with a tokenizer")
    parser.add_argument("--child", type=Path, help="its child; without it one of random weights is made")
    parser.add_argument("--text", type=Path, required=True, help="what prompts are cut from")
    parser.add_argument(
        "--transformers-serve", nargs="?", const=sys.executable, metavar="PYTHON",
        help="start transformers' own server beside, with the parent; this Python needs transformers[serving] and accelerate",
    )  # fmt: skip
    parser.add_argument("--other", action="append", default=[], help="NAME=URL of another server")
    parser.add_argument("--other-model", help="what other servers call the checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64, help="of one run; a quarter for a user alone")
    parser.add_argument("--arrivals", type=int, default=64, help="Poisson arrivals of one run")
    parser.add_argument("--rate", type=float, default=0.0, help="Poisson arrivals a second; 0: 1.5 x what the child can do")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--poisson-tokens", type=int, default=128, help="mean length of an answer to a Poisson arrival")
    parser.add_argument(
        "--request-ms", type=float, default=0.0, help="for the prediction, as benchmarks.serving_prediction found it"
    )
    parser.add_argument("--only-batches", action="store_true", help="only 16 users beside generate() on batches of 16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all ways, and of the profile")
    parser.add_argument("--quick", action="store_true", help="one round of 16 requests and 16 arrivals")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.requests, options.arrivals = 1, 16, 16
    compute_with(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        child = options.child or Path(folder) / "child"
        if options.child is None:
            random_child(options.parent, child)
        measure(child, options)


if __name__ == "__main__":
    main()
