"""Memory of a worker of global distillation that holds everything (DDP) and of one with a shard (FSDP2): python -m benchmarks.gkd_memory

Every row is a group of processes over gloo on this machine, without Ray. They load a random Llama and a child of it of about as many
parameters, look at held-out text, take steps, save a checkpoint and write the child. `peak_mib` is what the worker that needs most had at
the most beside what it had before it loaded anything: anonymous memory, so without the pages of files, looked at every 5 ms. What is freed
goes back to the system at once here, so that it is what tensors take and not what the allocator keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.record import write
from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.data.splits import TOKENS
from puzzle_ray.distill.gkd import CHILD, GkdJob, StoredCheckpoint, load_gkd_trainer, publish_distilled
from puzzle_ray.distill.settings import GkdConfig
from puzzle_ray.models.child import new_child, save_child
from puzzle_ray.store import Store

MIB = 1 << 20
LENGTH, STEPS, VOCAB_SIZE = 64, 2, 8192
SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": False}


class Peak:
    """The most anonymous memory of this process since `start_mib` was looked at."""

    def __init__(self) -> None:
        self.start_mib = self.most = self.now()
        threading.Thread(target=self._watch, daemon=True).start()

    def now(self) -> float:
        words = Path("/proc/self/status").read_text().split("RssAnon:")[1].split()
        return int(words[0]) / 1024

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, self.now())
            time.sleep(0.005)

    @property
    def mib(self) -> float:
        return self.most - self.start_mib


def job_of(folder: Path, config: GkdConfig) -> GkdJob:
    store = Store(str(folder / "store"))
    child, data = store.artifact("realize", {}, {}), store.artifact("data", {}, {})
    heldout = (np.arange(4 * LENGTH).reshape(4, LENGTH),)
    return GkdJob(
        str(folder / "parent"), child, data, store.artifact("gkd", {"of": config.parallel}, {}), config, 3, heldout=heldout
    )


def prepare(folder: Path, hidden_size: int, layers: int, dtype: torch.dtype, config: GkdConfig) -> int:
    """Writes parent and child in `dtype`, and tokens. Returns the child's number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
    }
    model_config = LlamaConfig(**SHAPE, **shape)
    LlamaForCausalLM(model_config).to(dtype).save_pretrained(folder / "parent")
    child = new_child(model_config, [LayerChoice("gqa:2", "parent")] * layers, dtype)
    job = job_of(folder, config)
    with job.child.folder_to_publish(CHILD) as target:
        save_child(child, folder / "parent", target)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB_SIZE, (64, LENGTH)).astype(np.int32))
    job.data.write_tensors(TOKENS, {"train": tokens, "heldout": tokens[:2].clone()})
    return sum(p.numel() for p in child.parameters())


def work(folder: Path, config: GkdConfig, rank: int) -> dict[str, Any]:
    """What one worker does, and its peak after every part."""
    from torch import distributed

    from puzzle_ray.distill.sharded_checkpoint import save_shards

    torch.set_num_threads(1)
    sharded, workers = config.parallel == "fsdp", config.num_workers
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet-{config.parallel}", rank=rank, world_size=workers)
    job, peak, after = job_of(folder, config), Peak(), {}
    trainer = load_gkd_trainer(job, ranks=[rank], all_reduce=distributed.all_reduce, sharded=sharded)
    guard = trainer.guard
    assert guard is not None
    after["load"] = peak.mib
    guard.look(0)
    for _ in range(STEPS):
        trainer.step()
    guard.look(STEPS)
    after["steps"] = peak.mib
    if sharded:
        save_shards(trainer, folder / f"shard-{rank}")
    else:
        StoredCheckpoint(job.artifact, rank == 0).save(trainer)
    after["checkpoint"] = peak.mib
    if sharded or rank == 0:
        publish_distilled(trainer, job, writes=rank == 0)
    distributed.barrier()
    distributed.destroy_process_group()
    return {"after": {name: round(value) for name, value in after.items()}, "peak_mib": peak.mib}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2, help="that share the child with FSDP2")
    parser.add_argument("--ddp-workers", type=int, help="each with the whole child; default: as many")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the parent's and the child's files"
    )
    parser.add_argument("--micro-batch-tokens", type=int, default=256)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS, metavar=("FOLDER", "PARALLEL", "RANK"))
    given = parser.parse_args()
    count = {"ddp": given.ddp_workers or given.workers, "fsdp": given.workers}

    def config(parallel: str) -> GkdConfig:
        settings = {"tokens": 1 << 30, "micro_batch_tokens": given.micro_batch_tokens, "num_workers": count[parallel]}
        return GkdConfig.model_validate(settings | {"parallel": parallel, "heldout_tokens": 4 * LENGTH})

    if given.one:
        folder, parallel, rank = given.one
        print(json.dumps(work(Path(folder), config(parallel), int(rank))))
        return
    loopback = next(name for name in psutil.net_if_addrs() if name in ("lo", "lo0"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback, "MALLOC_MMAP_THRESHOLD_": "65536"}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        num_params = prepare(Path(scratch), given.hidden_size, given.layers, getattr(torch, given.dtype), config("ddp"))
        for parallel in ("ddp", "fsdp"):
            words = [sys.executable, "-m", "benchmarks.gkd_memory", *sys.argv[1:], "--one", scratch, parallel]
            lines = [[*words, str(rank)] for rank in range(count[parallel])]
            processes = [subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True) for line in lines]
            found = [json.loads(process.communicate(timeout=1800)[0].splitlines()[-1]) for process in processes]
            for rank, each in enumerate(found):
                rows.append(
                    {"parallel": parallel, "rank": rank, **each, "bytes_per_parameter": each["peak_mib"] * MIB / num_params}
                )
                print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    most = {p: max(row["peak_mib"] for row in rows if row["parallel"] == p) for p in ("ddp", "fsdp")}
    least = min(row["peak_mib"] for row in rows if row["parallel"] == "ddp")
    summary = {
        "fsdp_over_ddp": most["fsdp"] / most["ddp"],
        "fsdp_over_ddps_smallest": most["fsdp"] / least,
        "ddp_peak_mib": most["ddp"],
        "fsdp_peak_mib": most["fsdp"],
        "parameters": num_params,
        "dtype": given.dtype,
        "ddp_workers": count["ddp"],
        "fsdp_workers": count["fsdp"],
    }
    for name, value in summary.items():
        print(f"{name:24} {value}")
    write(given.out, rows, summary)


if __name__ == "__main__":
    main()
