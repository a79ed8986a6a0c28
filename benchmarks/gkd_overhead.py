"""A step of global distillation under Ray Train and FSDP2 against a loop written by hand: python -m benchmarks.gkd_overhead --out FILE.json

The loop by hand is FSDP2 as its documentation shows it: `--workers` processes over gloo without Ray, whole logits, the same models, data,
losses and optimizer. Both stand ready beside each other, and take turns of `--steps` steps in one run. CPU seconds are those of all
processes of a turn, Ray's own among them; wall seconds those of the slowest worker. `step_ratio` is a median over rounds, each of
neighbouring turns; `step_ratio_workers` counts Ray's workers alone, without its other processes, whose use goes with time and not with
steps. `--quick` is one round of few steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.bld_overhead import cpu_s, spent, tree
from benchmarks.record import write
from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.data.order import Tokens
from puzzle_ray.data.splits import TOKENS
from puzzle_ray.distill.gkd import CHILD, GkdJob
from puzzle_ray.distill.settings import GkdConfig
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import load_model, new_child, read_config, save_child
from puzzle_ray.process import compute_with
from puzzle_ray.store import Store

PLAIN, RAY = "loop by hand", "Ray Train"
WARM = 2  # steps before the first turn
LENGTH = 256
POLL_S = 0.02


def job_of(folder: Path, config: GkdConfig) -> GkdJob:
    """What `prepare` wrote."""
    store = Store(str(folder / "store"))
    child, data = store.artifact("realize", {}, {}), store.artifact("data", {}, {})
    return GkdJob(str(folder / "parent"), child, data, store.artifact("gkd", {}, {}), config, seed=3)


def prepare(folder: Path, parent: Path, config: GkdConfig, sequences: int) -> None:
    """A child of the parent with random weights, half as wide everywhere, and random tokens."""
    (folder / "parent").symlink_to(parent.absolute())
    job, model_config = job_of(folder, config), read_config(locate(str(parent)))
    torch.manual_seed(0)
    half = LayerChoice(f"gqa:{max(1, model_config.num_key_value_heads // 2)}", f"ffn:{model_config.intermediate_size // 2}")
    child = new_child(model_config, [half] * model_config.num_hidden_layers, torch.float32)
    with job.child.folder_to_publish(CHILD) as target:
        save_child(child, parent, target)
    tokens = np.random.default_rng(0).integers(0, model_config.vocab_size, (sequences, LENGTH)).astype(np.int32)
    job.data.write_tensors(TOKENS, {"train": torch.from_numpy(tokens), "heldout": torch.from_numpy(tokens[:2].copy())})


def take_turns(folder: Path, name: str, rank: int, rounds: int, steps: int, step: Callable[[], float]) -> None:
    """Takes `steps` steps whenever the file of this turn is there, and says how long they took."""
    from torch import distributed

    losses = [step() for _ in range(WARM)]
    say(folder / f"{name}-ready-{rank}", {"loss": losses[0]})
    for turn in range(rounds):
        while not (folder / f"{name}-go-{turn}").exists():
            time.sleep(POLL_S)
        distributed.barrier()
        begun = time.monotonic()
        for _ in range(steps):
            step()
        say(folder / f"{name}-done-{turn}-{rank}", {"wall_s": time.monotonic() - begun})


def say(path: Path, value: Any) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(value))
    partial.rename(path)


def plain_step(job: GkdJob, rank: int) -> Callable[[], float]:
    """A step of the loop by hand."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn import functional

    from puzzle_ray.data.splits import load_tokens
    from puzzle_ray.models.describe import describe

    config, mesh = job.config, init_device_mesh("cpu", (job.config.num_workers,))
    parent = load_model(locate(job.parent), torch.float32).requires_grad_(False)
    child = load_model(job.child.local_folder(CHILD), torch.float32)
    for model in (parent, child):
        for layer in model.get_submodule(describe(model.config).layers).children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(child.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    tokens: Tokens = load_tokens(job.data)[0]
    done = iter(range(10**9))

    def step() -> float:
        place = next(done) * config.num_workers + rank
        ids = tokens.batch(job.seed, place, config.micro_batch_tokens // LENGTH)
        with torch.no_grad():
            target = parent(ids, output_hidden_states=True, use_cache=False)
        found = child(ids, output_hidden_states=True, use_cache=False)
        log_probs = [out.logits.float().log_softmax(-1).flatten(0, 1) for out in (found, target)]
        kl = functional.kl_div(*log_probs, log_target=True, reduction="batchmean")
        pairs = zip(found.hidden_states[1:], target.hidden_states[1:], strict=True)
        cosine = 1 - torch.stack([functional.cosine_similarity(a, b, dim=-1).mean() for a, b in pairs]).mean()
        (kl + cosine).backward()
        torch.nn.utils.clip_grad_norm_(child.parameters(), config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        both = torch.stack([kl.detach(), cosine.detach()])
        distributed.all_reduce(both)
        return float(both[0]) / config.num_workers

    return step


def plain_worker(folder: Path, config: GkdConfig, rank: int, rounds: int, steps: int) -> None:
    from torch import distributed

    compute_with(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=config.num_workers)
    take_turns(folder, PLAIN, rank, rounds, steps, plain_step(job_of(folder, config), rank))
    distributed.destroy_process_group()


def ray_worker(given: dict[str, Any]) -> None:
    """A worker of Ray Train: the trainer that `actors.gkd` trains with."""
    from ray import train
    from torch import distributed

    from puzzle_ray.distill.gkd import load_gkd_trainer

    compute_with(1)
    job, rank = given["job"], train.get_context().get_world_rank()
    trainer = load_gkd_trainer(job, ranks=[rank], all_reduce=distributed.all_reduce, sharded=True)
    trainer.total_steps = 10**9
    take_turns(given["folder"], RAY, rank, given["rounds"], given["steps"], lambda: trainer.step().kl)


def ray_group(folder: Path, config: GkdConfig, rounds: int, steps: int) -> None:
    """Ray and its group in this process's children, until all turns are taken."""
    from jobs.session import start_here

    os.environ.update({"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"})  # as of actors.gkd
    start_here(config.num_workers, 256 << 20)
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    given = {"job": job_of(folder, config), "folder": folder, "rounds": rounds, "steps": steps}
    TorchTrainer(
        ray_worker,
        train_loop_config=given,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=train.ScalingConfig(num_workers=config.num_workers, resources_per_worker={"CPU": 1}),
        run_config=train.RunConfig(name="gkd", storage_path=str(folder / "ray-train")),
    ).fit()


def await_all(paths: list[Path], processes: list[subprocess.Popen[bytes]]) -> list[Any]:
    """What the processes said in files. Raises RuntimeError where one of them ended without a word."""
    while not all(path.exists() for path in paths):
        if any(process.poll() for process in processes):
            raise RuntimeError("a process that is measured ended early; see its output")
        time.sleep(POLL_S)
    return [json.loads(path.read_text()) for path in paths]


def measured(folder: Path, config: GkdConfig, rounds: int, steps: int) -> list[dict[str, Any]]:
    """A row per turn."""
    words = [sys.executable, "-m", "benchmarks.gkd_overhead", *sys.argv[1:], "--serve", str(folder)]
    loopback = next(name for name in psutil.net_if_addrs() if name in ("lo", "lo0"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": loopback}
    workers = range(config.num_workers)
    kinds = {PLAIN: [[*words, "--rank", str(rank)] for rank in workers], RAY: [words]}
    processes = {kind: [subprocess.Popen(line, env=environment) for line in lines] for kind, lines in kinds.items()}
    everything = [process for found in processes.values() for process in found]
    rows = []
    try:
        first = {kind: await_all([folder / f"{kind}-ready-{rank}" for rank in workers], everything) for kind in kinds}
        kl = {kind: found[0]["loss"] for kind, found in first.items()}
        assert abs(kl[PLAIN] - kl[RAY]) < 1e-3 * abs(kl[PLAIN]), f"both must do the same work: {kl}"
        for turn in range(rounds):
            for kind in (PLAIN, RAY) if turn % 2 == 0 else (RAY, PLAIN):
                roots = [psutil.Process(process.pid) for process in processes[kind]]
                before = cpu_s([p for root in roots for p in tree(root)])
                (folder / f"{kind}-go-{turn}").touch()
                done = await_all([folder / f"{kind}-done-{turn}-{rank}" for rank in workers], everything)
                used = spent(before, cpu_s([p for root in roots for p in tree(root)]))
                wall = max(each["wall_s"] for each in done)
                row = {
                    "round": turn,
                    "way": kind,
                    "wall_s": wall / steps,
                    "cpu_s": sum(used.values()) / steps,
                    "first_kl": kl[kind],
                }
                rows.append(row | {"cpu_s_by_process": {name: seconds / steps for name, seconds in used.items()}})
                print(
                    f"round {turn}  {kind:13} wall {wall / steps:.3f} s  CPU {sum(used.values()) / steps:.3f} s a step",
                    flush=True,
                )
    finally:
        for process in everything:
            if process.poll() is None and len(rows) < 2 * rounds:
                process.terminate()
        for process in everything:
            process.wait(timeout=60)
    return rows


def summarised(rows: list[dict[str, Any]]) -> dict[str, float]:
    def ratio(what: Callable[[dict[str, Any]], float]) -> float:
        both = [[what(row) for row in rows if row["way"] == way] for way in (RAY, PLAIN)]
        return statistics.median(a / b for a, b in zip(*both, strict=True))

    middle = {way: statistics.median(row["wall_s"] for row in rows if row["way"] == way) for way in (PLAIN, RAY)}
    return {
        "step_ratio": ratio(lambda row: row["cpu_s"]),
        "step_ratio_workers": ratio(lambda row: row["cpu_s_by_process"].get("ray::RayTrainWorker", row["cpu_s"])),
        "step_ratio_wall": ratio(lambda row: row["wall_s"]),
        "plain_step_s": middle[PLAIN],
        "ray_step_s": middle[RAY],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--parent", type=Path, default=Path("../shared/data/gutenberg7m"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("--quick", action="store_true", help="one round of two steps")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)  # a process that is measured
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    rounds, steps = (1, 2) if given.quick else (given.rounds, given.steps)
    config = GkdConfig(
        tokens=1 << 40,
        micro_batch_tokens=given.micro_batch_tokens,
        num_workers=given.workers,
        learning_rate=1e-4,
        warmup_fraction=0.0,
        heldout_tokens=0,
        parallel="fsdp",
    )
    if given.serve:
        if given.rank is not None:
            plain_worker(given.serve, config, given.rank, rounds, steps)
        else:
            ray_group(given.serve, config, rounds, steps)
        return
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch), given.parent, config, (WARM + rounds * steps) * given.workers * given.micro_batch_tokens // LENGTH)
        rows = measured(Path(scratch), config, rounds, steps)
    summary = summarised(rows) | {
        "workers": given.workers,
        "micro_batch_tokens": given.micro_batch_tokens,
        "parent": given.parent.name,
    }
    for name, value in summary.items():
        print(f"{name:20} {value}")
    write(given.out, rows, summary)


if __name__ == "__main__":
    main()
