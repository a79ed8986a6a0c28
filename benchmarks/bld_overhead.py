"""What shards and trainers cost over one process: python -m benchmarks.bld_overhead --out FILE.json [--quick]

The same block distillation of a random Llama (8 layers, hidden size 256, three variants a block, 2,048 tokens a micro-batch) in one
plain PyTorch process, and on Ray: shards that stream hidden states through the object store to trainers. CPU seconds are those of all
processes together (driver, workers, raylet, GCS, agents), between two micro-batches well after the start. Once the blocks are shared
by as few trainers as there are cores, once every block has an actor of its own. A core is slower while the others are busy, so the one
process is measured alone and once more with a copy of it on every core: the work that Ray adds is the ratio to the latter.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import write
from puzzle_ray.artifacts import LayerSpace, SearchSpace
from puzzle_ray.config import ClusterConfig, LibraryConfig
from puzzle_ray.data import Tokens
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Store

NUM_LAYERS, HIDDEN_SIZE, LENGTH, MICRO_BATCH_TOKENS = 8, 256, 256, 2048
SPACE = SearchSpace((LayerSpace(("parent", "gqa:2"), ("parent", "ffn:344", "ffn:168"), "full_attention"),) * NUM_LAYERS)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def cpu_s(processes: list[psutil.Process]) -> dict[str, float]:
    """CPU seconds so far, by the processes' names. Those that have ended are left out."""
    found: dict[str, float] = {}
    for process in processes:
        try:
            times, name = process.cpu_times(), process.name().partition(".")[0]  # a Ray worker adds what it is at
        except psutil.NoSuchProcess:
            continue
        found[name] = found.get(name, 0.0) + times.user + times.system
    return found


class Meter(Quiet):
    """Takes the time and all processes' CPU seconds when micro-batch `begin` is done, and again at `end`."""

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end, self.done = begin, end, 0
        self.marks: list[tuple[float, dict[str, float]]] = []

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Meter]:
        yield self

    def advance(self, count: int = 1, **facts: float) -> None:
        self.done += count
        if self.done in (self.begin, self.end):
            self.marks.append((time.monotonic(), cpu_s(tree(psutil.Process()))))

    def row(self) -> dict[str, Any]:
        (begun, before), (ended, after) = self.marks
        count = self.end - self.begin
        by_process = {name: (seconds - before.get(name, 0.0)) / count for name, seconds in after.items()}
        return {"cpu_s": sum(by_process.values()), "wall_s": (ended - begun) / count, "cpu_s_by_process": by_process}


def configured(steps: int) -> tuple[LibraryConfig, Meter]:
    """`steps` training micro-batches, of which the first quarter is not counted."""
    small = MICRO_BATCH_TOKENS
    config = LibraryConfig(
        tokens=steps * small,
        calibration_tokens=small,
        validation_tokens=small,
        micro_batch_tokens=small,
        checkpoint_every=10**6,
    )
    return config, Meter(2 + steps // 4, 2 + steps)


def random_tokens() -> Tokens:
    import numpy as np

    return Tokens(np.random.default_rng(0).integers(0, 1024, (512, LENGTH), dtype=np.int32))


def in_one_process(folder: str, steps: int, num_threads: int, store: Store) -> dict[str, Any]:
    from puzzle_ray.distill.library import build_serially

    config, meter = configured(steps)
    step = store.step("library", {}, {})
    build_serially(folder, SPACE, config, random_tokens(), 0, step, meter, num_threads)
    return meter.row()


def on_ray(folder: str, steps: int, blocks_per_trainer: int, num_shards: int, store: Store) -> dict[str, Any]:
    """Every trainer and shard with one thread. With more trainers than cores, cores are promised twice."""
    import ray

    from actors import library_stream

    num_trainers = num_shards * -(-NUM_LAYERS // num_shards // blocks_per_trainer)
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=max(CORES, num_trainers),
        object_store_memory=512 << 20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    config, meter = configured(steps)
    cluster = ClusterConfig(num_shards=num_shards, blocks_per_trainer=blocks_per_trainer)
    usages: list[Any] = []
    show = library_stream._say_usage
    library_stream._say_usage = lambda stream: usages.extend(stream.usage()) or show(stream)  # type: ignore[func-returns-value]
    stop, peak = threading.Event(), [0.0]
    total = ray.cluster_resources()["object_store_memory"]

    def sample() -> None:
        while not stop.wait(1.0):
            peak[0] = max(peak[0], total - ray.available_resources().get("object_store_memory", total))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        step = store.step("library", {}, {})
        library_stream.build_library(folder, SPACE, config, cluster, random_tokens(), 0, step, meter)
    finally:
        stop.set()
        sampler.join()
        library_stream._say_usage = show
        ray.shutdown()
    flow = library_stream.Flow.of(config, HIDDEN_SIZE)
    return meter.row() | {
        "bytes_per_token": sum(usage.sent_bytes / usage.sent_tokens for usage in usages),
        "store_peak_bytes": peak[0],
        "store_bound_bytes": flow.bound_bytes(NUM_LAYERS + 1),
        "peak_rss_bytes": [usage.peak_rss_bytes for usage in usages],
    }


WAYS: dict[str, dict[str, int]] = {
    "one process, 1 thread": {"num_threads": 1},
    "one process, 1 thread, on every core": {"num_threads": 1, "copies": CORES},
    "one process, all cores": {"num_threads": CORES},
    "blocks shared per trainer": {"num_shards": 1, "blocks_per_trainer": -(-NUM_LAYERS // CORES)},
    "an actor per block": {"num_shards": 1, "blocks_per_trainer": 1},
}


def one(way: str, folder: str, steps: int) -> dict[str, Any]:
    """One measurement in this process."""
    options = WAYS[way]
    with tempfile.TemporaryDirectory() as scratch:
        if "num_threads" in options:
            return in_one_process(folder, steps, options["num_threads"], Store(scratch))
        return on_ray(folder, steps, options["blocks_per_trainer"], options["num_shards"], Store(scratch))


def measured(way: str, folder: Path, steps: int) -> dict[str, Any]:
    """One measurement in a process of its own, or the mean over copies that run at the same time."""
    words = [sys.executable, "-m", "benchmarks.bld_overhead", "--way", way, "--parent", str(folder), "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(WAYS[way].get("num_threads", 1)), "OMP_WAIT_POLICY": "PASSIVE"}
    copies = [
        subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(WAYS[way].get("copies", 1))
    ]
    found = [json.loads(copy.communicate(timeout=1800)[0].splitlines()[-1]) for copy in copies]
    means = {name: statistics.fmean(row[name] for row in found) for name in ("cpu_s", "wall_s")}
    return {"way": way, "steps": steps} | found[0] | means


def summarised(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over rounds; ratios are formed within a round, in which the machine is the same for all."""
    rounds = [{row["way"]: row for row in rows if row["round"] == number} for number in sorted({row["round"] for row in rows})]
    single, busy, cores, shared, each = WAYS

    def median(ratio: Any) -> float:
        return float(statistics.median(ratio(found) for found in rounds))

    on_ray_rows = [row for row in rows if "bytes_per_token" in row]
    return {
        "cpu_ratio": median(lambda r: r[shared]["cpu_s"] / r[single]["cpu_s"]),
        "cpu_ratio_actor_per_block": median(lambda r: r[each]["cpu_s"] / r[single]["cpu_s"]),
        "cpu_ratio_cores_as_busy": median(lambda r: r[shared]["cpu_s"] / r[busy]["cpu_s"]),
        "cpu_ratio_actor_per_block_cores_as_busy": median(lambda r: r[each]["cpu_s"] / r[busy]["cpu_s"]),
        "wall_ratio_best_single": median(lambda r: r[shared]["wall_s"] / min(r[single]["wall_s"], r[cores]["wall_s"])),
        "bytes_ratio": max(row["bytes_per_token"] for row in on_ray_rows) / ((NUM_LAYERS + 1) * HIDDEN_SIZE * 4),
        "store_peak_over_bound": max(row["store_peak_bytes"] / row["store_bound_bytes"] for row in on_ray_rows),
        "single_cpu_s_per_micro_batch": median(lambda r: r[single]["cpu_s"]),
        "shared_cpu_s_per_micro_batch": median(lambda r: r[shared]["cpu_s"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="one round of few micro-batches")
    parser.add_argument("--way", choices=WAYS, help="measure this one alone and print it")
    parser.add_argument("--parent", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(one(arguments.way, str(arguments.parent), arguments.steps)))
        return
    if arguments.out is None:
        parser.error("--out is needed")
    steps, rounds = (8, 1) if arguments.quick else (arguments.steps, 3)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(Path(folder))
        for number in range(rounds):
            for way in WAYS:
                rows.append({"round": number} | measured(way, Path(folder), steps))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    summary = summarised(rows)
    for name, value in summary.items():
        print(f"{name}: {value:.4g}")
    write(arguments.out, rows, {"layers": NUM_LAYERS, "hidden_size": HIDDEN_SIZE, "cores": CORES} | summary)


if __name__ == "__main__":
    main()
