"""A random parent with a real model's shape through the whole pipeline: python -m benchmarks.rehearsal --out FILE.json [--quick]

The parent has random weights in bfloat16 and a small byte-level tokenizer; the text is the standard library's own sources. `compress`
runs as a user runs it, with a few thousand tokens, in a process of its own. Every half second the memory of that process and of all
below it is read: private memory (resident less what is file-backed or shared), and the object store's shared memory once. Of a process
by itself, mapped files count too, because weights are mapped from them, and its peak is the kernel's, so that none is missed in between.

A row for every stage has its seconds; a row for every kind of process has its private peak, what a process of that kind has before it
holds anything (`idle`: of a Ray worker that has loaded what the kind loads, and has built and trained a matrix, measured), and what
`puzzle-ray plan` says that it holds by design. `plan_error` is the largest relative difference of peak less idle from the plan, over
kinds of processes that are planned to hold at least 256 MiB. The child counts as large as the parent in the plan, so GKD's worker and
the evaluation's are compared with the plan for the child that was found.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.record import write

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
    },
    "llama-160m": {
        "model_type": "llama",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 32_000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "llama-15m": {
        "model_type": "llama",
        "hidden_size": 288,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "vocab_size": 32_000,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
}
KINDS = {  # how a process calls itself -> (stage, process) of the plan, and the modules that it has loaded before it holds anything
    "ParentShard": (
        ("library", "parent shard"),
        ("actors.parent_shard", "puzzle_ray.scoring.shard", "puzzle_ray.distill.library"),
    ),
    "BlockTrainer": (("library", "block trainer"), ("actors.block_trainer", "puzzle_ray.distill.library")),
    "TrainWorker": (
        ("gkd", "worker"),
        ("actors.gkd", "actors.gkd_checkpoints", "ray.train.torch", "puzzle_ray.distill.sharding"),
    ),
    "LoneWorker": (("evaluation", "worker"), ("actors.lone_worker", "puzzle_ray.evaluation.evaluate", "transformers.generation")),
}
TRAIN = ("BlockTrainer", "TrainWorker")
SETTINGS: dict[str, Any] = {
    "data": {"sequence_length": 128, "max_train_tokens": 40_000, "max_heldout_tokens": 8192},
    "space": {"attention": ["parent", "gqa:50%", "noop"], "ffn": ["parent", "ffn:50%", "noop"]},
    "profile": {
        "scenario": {"batch_size": 1, "input_tokens": 64, "output_tokens": 4},
        "dtype": "bfloat16",
        "repeats": 2,
        "stack": 1,
    },
    "library": {
        "tokens": 1024,
        "micro_batch_tokens": 256,
        "calibration_tokens": 512,
        "validation_tokens": 256,
        "checkpoint_every": 1000,
        "parent_dtype": "bfloat16",
        "activation_dtype": "bfloat16",
    },
    "scoring": {"tokens": 256, "micro_batch_tokens": 256, "dtype": "bfloat16", "shortlist": "fisher", "shortlist_keep": 0.1},
    "search": {"limits": {"speedup": None, "params_fraction": 0.75}},
    "gkd": {
        "parent_dtype": "bfloat16",
        "tokens": 1024,
        "micro_batch_tokens": 256,
        "heldout_tokens": 256,
        "heldout_looks": 2,
        "checkpoint_every": 1000,
    },
    "evaluate": {"tokens": 256, "micro_batch_tokens": 256, "repeats": 1, "sample_tokens": 2, "samples": 1},
    "cluster": {"num_shards": 2},
}


def make_parent(folder: Path, shape: dict[str, Any], text_bytes: int) -> None:
    """Random weights in bfloat16, a tokenizer, and text."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.standard_library import standard_library_files
    from puzzle_ray.recipes.tiny_parent import train_tokenizer

    texts = [path.read_text(errors="ignore") for _, path in standard_library_files(text_bytes)]
    tokenizer = train_tokenizer(texts, min(4096, shape["vocab_size"]))
    named = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    config = AutoConfig.for_model(**shape, **named, dtype="bfloat16")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "parent")
    tokenizer.save_pretrained(folder / "parent")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(rows)


def own_bytes(pid: int) -> int:
    """Resident memory of a process without the object store: its own, and mapped files."""
    sizes = _status(pid)
    return sizes.get("RssAnon", 0) + sizes.get("RssFile", 0)


def high_water_bytes(pid: int) -> int:
    """The most of it so far. The kernel counts the object store in, so what is mapped of that now is taken off."""
    sizes = _status(pid)
    return sizes.get("VmHWM", 0) - sizes.get("RssShmem", 0)


def _status(pid: int) -> dict[str, int]:
    """What the kernel says of a process's memory, in bytes."""
    fields = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) << 10 for words in fields if len(words) == 3 and words[2] == "kB"}


class Memory(threading.Thread):
    """Peaks of a process and all below it, in bytes: private memory by kind of process, and of all together with shared memory."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root, self.ended = psutil.Process(pid), threading.Event()
        self.by_kind: dict[str, int] = defaultdict(int)
        self.pids: dict[str, set[int]] = defaultdict(set)
        self.total = 0

    def run(self) -> None:
        while not self.ended.wait(0.5):
            total, shared = 0, 0
            for process in [self.root, *self.root.children(recursive=True)]:
                try:
                    memory, words = process.memory_info(), " ".join(process.cmdline()[:1] or [process.name()])
                    store = sum(m.rss for m in process.memory_maps() if m.path.startswith("/dev/shm")) if "raylet" in words else 0
                    kind = next((kind for kind in KINDS if kind in words), "driver" if process == self.root else "other")
                    own = max(own_bytes(process.pid), high_water_bytes(process.pid) if kind in KINDS else 0)
                except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError, ProcessLookupError):
                    continue
                total += memory.rss - memory.shared
                shared = max(shared, store)
                self.by_kind[kind] = max(self.by_kind[kind], own)
                self.pids[kind].add(process.pid)
            self.total = max(self.total, total + shared)


def idle_here(modules: Sequence[str], trains: bool, parent: Path) -> int:
    """Memory of this process when it has loaded what some kind of process loads, the parent's classes too, and has used torch."""
    import torch

    from puzzle_ray.models.blocks import stack_without_weights
    from puzzle_ray.models.child import read_config
    from puzzle_ray.models.describe import describe
    from puzzle_ray.process import compute_with

    for name in modules:
        importlib.import_module(name)
    compute_with(1)
    config = read_config(parent)
    stack_without_weights(describe(config), config, 0, 1, torch.bfloat16)
    weight = torch.nn.Parameter(torch.ones(64, 64))
    with torch.no_grad():
        weight.bfloat16() @ weight.bfloat16()
    if trains:
        optimizer = torch.optim.AdamW([weight])
        (weight @ weight).sum().backward()
        optimizer.step()
    return own_bytes(os.getpid())


def idle_bytes(parent: Path) -> dict[str, int]:
    """By kind of process, each measured in a fresh Ray worker."""
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    try:
        task = ray.remote(max_calls=1)(idle_here)
        return {kind: ray.get(task.remote(modules, kind in TRAIN, parent), timeout=300) for kind, (_, modules) in KINDS.items()}
    finally:
        ray.shutdown()


def planned(folder: Path, config_file: Path, store: str, layers_per_trainer: int) -> dict[tuple[str, str], int]:
    """What the plan says that a process of each kind holds by design, for the child that was found."""
    from puzzle_ray.config import load
    from puzzle_ray.models.child import read_config
    from puzzle_ray.planning.demand import Sizes, demands
    from puzzle_ray.planning.evaluating import evaluation_phases
    from puzzle_ray.variants.space import search_space

    config = load(None, str(config_file), (f"cluster.blocks_per_trainer={layers_per_trainer}",))
    model_config = read_config(folder / "parent")
    sizes = Sizes(
        model_config, search_space(model_config, config.space.attention, config.space.ffn, config.space.ffn_multiple_of)
    )
    found = {(d.stage, d.process): d.total for d in demands(config, model_config, sizes)}
    (record,) = Path(store).glob("architecture-*/architecture.json")
    choice = json.loads(record.read_text())
    kept = choice["predicted"]["num_params"] / choice["parent_predicted"]["num_params"]
    shares = dict.fromkeys(("child", "gradients", "optimizer", "best weights", "activations"), kept)
    for demand in demands(config, model_config, sizes):
        if demand.stage == "gkd":
            found[demand.stage, demand.process] = int(sum(size * shares.get(name, 1) for name, size in demand.parts.items()))
    found["evaluation", "worker"] = max(sum(phase.values()) for phase in evaluation_phases(config, sizes, 0, kept).values())
    library = ("library", "parent shard"), ("scores", "parent shard")
    found[library[0]] = max(found[each] for each in library)  # the same kind of process, in both stages
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", required=True)
    parser.add_argument("--shape", default="qwen3-0.6b", help=f"one of {', '.join(SHAPES)}, or a config.json")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--store", help="kept, so that a broken run goes on; default: a folder that is removed")
    parser.add_argument("--quick", action="store_true", help="the smallest shape: a check that it runs")
    arguments = parser.parse_args()
    name = "llama-15m" if arguments.quick else arguments.shape
    shape = dict(SHAPES.get(name) or json.loads(Path(name).read_text()))
    if arguments.layers:
        shape["num_hidden_layers"] = arguments.layers
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.store or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        store, config_file = str(folder / "runs"), folder / "rehearsal.yaml"
        if not (folder / "text.jsonl").exists():
            make_parent(folder, shape, 400_000)
        settings = SETTINGS | {"parent": str(folder / "parent"), "store": store}
        settings["data"] = SETTINGS["data"] | {"train": str(folder / "text.jsonl")}
        config_file.write_text(yaml.safe_dump(settings))
        started = time.monotonic()
        words = [sys.executable, "-m", "jobs.compress", "--config", str(config_file)]
        process = subprocess.Popen(words, env=os.environ | {"PYTHONUNBUFFERED": "1"})
        memory = Memory(process.pid)
        memory.start()
        code = process.wait()
        memory.ended.set()
        seconds = time.monotonic() - started
        if code:
            raise SystemExit(f"compress ended with {code}; its highest memory was {memory.total / 2**30:.1f} GiB in all")
        stages = {}
        for record in sorted(Path(store).glob("*/artifact.json"), key=lambda path: path.stat().st_mtime):
            facts = json.loads(record.read_text())
            stages[facts["stage"]] = round(facts.get("seconds") or 0.0, 1)
        trainers = len(memory.pids["BlockTrainer"]) or 1
        plan = planned(folder, config_file, store, -(-shape["num_hidden_layers"] // trainers))
        idle = idle_bytes(folder / "parent")
    rows: list[dict[str, Any]] = [{"stage": stage, "seconds": took} for stage, took in stages.items()]
    errors = {}
    over = {}
    for kind, peak in sorted(memory.by_kind.items()):
        row: dict[str, Any] = {"process": kind, "peak_gib": peak / 2**30}
        if kind in KINDS:
            holds = plan[KINDS[kind][0]]
            row |= {"processes": len(memory.pids[kind]), "idle_gib": idle[kind] / 2**30, "planned_gib": holds / 2**30}
            over[kind] = peak / (idle[kind] + holds)
            if holds >= 256 << 20:
                errors[kind] = abs(peak - idle[kind] - holds) / holds
        rows.append(row)
    for row in rows:
        print("  ".join(f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()))
    summary = {
        "shape": name,
        "num_hidden_layers": shape["num_hidden_layers"],
        "seconds": seconds,
        "peak_memory_gib": memory.total / 2**30,
        "peak_process_gib": max(memory.by_kind.values()) / 2**30,
        "peak_over_plan": max(over.values()),
        "plan_error": max(errors.values(), default=None),
        "stage_seconds": stages,
    }
    for word, value in summary.items():
        print(f"{word:20} {value}")
    write(arguments.out, rows, summary)


if __name__ == "__main__":
    main()
