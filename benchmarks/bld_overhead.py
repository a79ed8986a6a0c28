"""What shards and trainers cost over one process: python -m benchmarks.bld_overhead --out FILE.json [--quick]

The same block distillation of a random Llama (8 layers, hidden size 256, three variants a block, 2,048 tokens a micro-batch) in one
plain PyTorch process, and on Ray, started as a local run starts it: shards that stream hidden states through the object store to
trainers. CPU seconds are those of all processes together (driver, workers, raylet, GCS, agents). Once the blocks are shared by as few
trainers as there are cores, once every block has an actor of its own. All stand ready at the same time and take turns, some
micro-batches each, so that a machine whose speed drifts drifts for all alike; a ratio is of two neighbouring turns, the one process'
being the mean of the turns before and after. A plain process hands freed memory back to the kernel, as glibc does by default; ours
keep it, so one process that keeps it too takes turns as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import write
from puzzle_ray.artifacts import LayerSpace, SearchSpace
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.data.order import Tokens
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.process import num_cores
from puzzle_ray.store import Store

NUM_LAYERS, HIDDEN_SIZE, LENGTH, MICRO_BATCH_TOKENS = 8, 256, 256, 2048
SPACE = SearchSpace((LayerSpace(("parent", "gqa:2"), ("parent", "ffn:344", "ffn:168"), "full_attention"),) * NUM_LAYERS)
WATCHED = 6  # micro-batches of the turn in which the object store is looked at
CORES = num_cores()


def save_random_llama(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        vocab_size=1024,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=688,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def tree(root: psutil.Process) -> list[psutil.Process]:
    """A process and all that it has started, directly or not."""
    return [root, *root.children(recursive=True)]


def cpu_s(processes: list[psutil.Process]) -> dict[int, tuple[str, float]]:
    """Name and CPU seconds so far of every process by its id. Those that have ended are left out."""
    found = {}
    for process in processes:
        try:
            times, name = process.cpu_times(), process.name().partition(".")[0]  # a Ray worker adds what it is at
        except psutil.NoSuchProcess:
            continue
        found[process.pid] = (name, times.user + times.system)
    return found


def spent(before: dict[int, tuple[str, float]], after: dict[int, tuple[str, float]]) -> dict[str, float]:
    """CPU seconds between two looks, by name; of those that are there at the second."""
    found: dict[str, float] = {}
    for pid, (name, seconds) in after.items():
        found[name] = found.get(name, 0.0) + seconds - before.get(pid, (name, 0.0))[1]
    return found


def configured(steps: int) -> LibraryConfig:
    """`steps` training micro-batches behind one of calibration and one of validation."""
    small = MICRO_BATCH_TOKENS
    return LibraryConfig(
        tokens=steps * small,
        calibration_tokens=small,
        validation_tokens=small,
        micro_batch_tokens=small,
        checkpoint_every=10**6,
    )


def random_tokens() -> Tokens:
    import numpy as np

    return Tokens(np.random.default_rng(0).integers(0, 1024, (512, LENGTH), dtype=np.int32))


class OnePlainProcess:
    """The stage in this process."""

    def __init__(self, folder: str, config: LibraryConfig, store: Store, num_threads: int, keeps_memory: bool = True) -> None:
        import torch

        from puzzle_ray.distill import library
        from puzzle_ray.distill.library import SerialLibrary

        if not keeps_memory:
            library.compute_with = torch.set_num_threads
        self.stage = SerialLibrary(folder, SPACE, config, random_tokens(), 0, store.artifact("library", {}, {}), num_threads)

    def run(self, count: int) -> None:
        """The next `count` micro-batches."""
        for _ in range(count):
            self.stage.step(self.stage.group.last + 1)

    def end(self) -> dict[str, Any]:
        return {}


class OnRay:
    """The stage on a cluster of its own. Every trainer and shard has one thread; more trainers than cores share them."""

    def __init__(self, folder: str, config: LibraryConfig, store: Store, blocks_per_trainer: int) -> None:
        from actors import library_stream
        from jobs.session import start_here
        from puzzle_ray.distill.text import LibraryText

        num_trainers = -(-NUM_LAYERS // blocks_per_trainer)
        start_here(max(CORES, num_trainers), 512 << 20)
        self.config, self.text = config, LibraryText.of(random_tokens(), 0, config)
        cluster = ClusterConfig(num_shards=1, blocks_per_trainer=blocks_per_trainer)
        step = store.artifact("library", {}, {})
        self.stream = library_stream.open_stream(folder, range(NUM_LAYERS), SPACE, config, cluster, step)
        self.flow, self.done = library_stream.flow, 0

    def run(self, count: int) -> None:
        """The next `count` micro-batches; none is in flight when it returns."""
        positions = range(self.done, self.done + count)
        self.flow(self.stream, positions, self.text, self.stream.flow.window, NoBar())
        self.done += count

    def end(self) -> dict[str, Any]:
        """What was put, and what a turn takes of the object store at the most; the turn is not one of those whose CPU time counts."""
        import ray

        stop, total = threading.Event(), ray.cluster_resources()["object_store_memory"]
        peak = 0.0

        def sample() -> None:
            nonlocal peak
            while not stop.wait(0.2):
                peak = max(peak, total - ray.available_resources().get("object_store_memory", total))

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            self.run(WATCHED)
        finally:
            stop.set()
            sampler.join()
        usages = self.stream.usage()
        self.stream.release()
        ray.shutdown()
        return {
            "bytes_per_token": sum(usage.sent_bytes / usage.sent_tokens for usage in usages),
            "store_peak_bytes": peak,
            "store_bound_bytes": self.stream.flow.bound_bytes(NUM_LAYERS + 1),
            "peak_rss_bytes": [usage.peak_rss_bytes for usage in usages],
        }


class NoBar:
    def advance(self, count: int = 1, **facts: float) -> None:
        """Nothing to show."""


def take_turns(kind: str, amount: int, folder: str, steps: int, rounds: int) -> None:
    """Serves turns: for every line on standard input `steps` micro-batches and a line of JSON; at its end, what else was seen."""
    config = configured(steps * rounds + 1 + WATCHED)
    with tempfile.TemporaryDirectory() as scratch:
        stage: OnRay | OnePlainProcess
        if kind == "ray":
            stage = OnRay(folder, config, Store(scratch), amount)
        else:
            stage = OnePlainProcess(folder, config, Store(scratch), amount, keeps_memory=kind == "threads")
        stage.run(3)  # calibration, validation, and a first training step
        print(json.dumps("ready"), flush=True)
        for _ in sys.stdin:
            begun, before = time.monotonic(), cpu_s(tree(psutil.Process()))
            stage.run(steps)
            wall, after = time.monotonic() - begun, cpu_s(tree(psutil.Process()))
            by_process = {name: seconds / steps for name, seconds in spent(before, after).items()}
            row = {"cpu_s": sum(by_process.values()), "wall_s": wall / steps, "cpu_s_by_process": by_process}
            print(json.dumps(row), flush=True)
        print(json.dumps(stage.end()), flush=True)


class Runner:
    """A process that takes turns."""

    def __init__(self, kind: str, amount: int, folder: Path, steps: int, rounds: int) -> None:
        given = ["--serve", kind, str(amount), "--parent", str(folder), "--steps", str(steps), "--rounds", str(rounds)]
        threads = str(1 if kind == "ray" else amount)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
        words = [sys.executable, "-m", "benchmarks.bld_overhead", *given]
        self.process = subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a measured process ended with exit code {self.process.wait()}; what it said stands above")
        return json.loads(line)

    def turn(self) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


PLAIN = "one plain process, 1 thread"
SINGLE, CORES_ALL = "one process, 1 thread", "one process, all cores"
ON_RAY = {"blocks shared per trainer": -(-NUM_LAYERS // CORES), "an actor per block": 1}


def measured(way: str, folder: Path, steps: int, rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of all turns of one way on Ray and of the plain processes beside it, and what else was seen of it."""
    kinds = [("ray", ON_RAY[way]), ("threads", 1), ("threads", CORES), ("plain", 1)]
    runners = [Runner(*kind, folder, steps, rounds + 1) for kind in kinds]
    try:
        for runner in runners:
            runner.answer()
        on_ray, single, cores, plain = runners
        rows = []
        for number in range(rounds + 1):
            turns = {PLAIN: plain, SINGLE: single}
            if number < rounds:
                turns |= {way: on_ray, CORES_ALL: cores}
            for name, runner in turns.items():
                rows.append({"beside": way, "round": number, "way": name} | runner.turn())
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        return rows, on_ray.end()
    finally:
        for runner in runners:
            runner.kill()


def summarised(rows: list[dict[str, Any]], ends: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over rounds of ratios within a round."""
    shared, each = ON_RAY

    def turns(beside: str, way: str, what: str) -> list[float]:
        return [row[what] for row in rows if row["beside"] == beside and row["way"] == way]

    def single(beside: str, what: str, way: str = SINGLE) -> list[float]:
        """The mean of the turns before and after."""
        found = turns(beside, way, what)
        return [(a + b) / 2 for a, b in zip(found, found[1:], strict=False)]

    def median_ratio(over: list[float], under: list[float]) -> float:
        return float(statistics.median(a / b for a, b in zip(over, under, strict=True)))

    def cpu_ratio(way: str, under: str) -> float:
        return median_ratio(turns(way, way, "cpu_s"), single(way, "cpu_s", under))

    best = [min(pair) for pair in zip(single(shared, "wall_s"), turns(shared, CORES_ALL, "wall_s"), strict=True)]
    return {
        "cpu_ratio": cpu_ratio(shared, PLAIN),
        "cpu_ratio_actor_per_block": cpu_ratio(each, PLAIN),
        "cpu_ratio_memory_kept": cpu_ratio(shared, SINGLE),
        "cpu_ratio_actor_per_block_memory_kept": cpu_ratio(each, SINGLE),
        "wall_ratio_best_single": median_ratio(turns(shared, shared, "wall_s"), best),
        "bytes_ratio": max(end["bytes_per_token"] for end in ends) / ((NUM_LAYERS + 1) * HIDDEN_SIZE * 4),
        "store_peak_over_bound": max(end["store_peak_bytes"] / end["store_bound_bytes"] for end in ends),
        "plain_cpu_s_per_micro_batch": statistics.median(turns(shared, PLAIN, "cpu_s")),
        "single_cpu_s_per_micro_batch": statistics.median(single(shared, "cpu_s")),
        "shared_cpu_s_per_micro_batch": statistics.median(turns(shared, shared, "cpu_s")),
        "actor_per_block_cpu_s_per_micro_batch": statistics.median(turns(each, each, "cpu_s")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="one round of few micro-batches")
    parser.add_argument("--steps", type=int, default=12, help="micro-batches of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)  # a process that is measured
    parser.add_argument("--parent", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        kind, amount = arguments.serve
        take_turns(kind, int(amount), str(arguments.parent), arguments.steps, arguments.rounds)
        return
    if arguments.out is None:
        parser.error("--out is needed")
    steps, rounds = (3, 1) if arguments.quick else (arguments.steps, arguments.rounds)
    rows: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(Path(folder))
        for way in ON_RAY:
            found, end = measured(way, Path(folder), steps, rounds)
            rows += found
            ends.append({"way": way} | end)
    summary = summarised(rows, ends)
    for name, value in summary.items():
        print(f"{name}: {value:.4g}")
    facts = {"layers": NUM_LAYERS, "hidden_size": HIDDEN_SIZE, "cores": CORES, "steps": steps, "rounds": rounds}
    write(arguments.out, rows + ends, facts | summary)


if __name__ == "__main__":
    main()
