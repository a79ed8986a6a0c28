"""Processes that distil together over gloo, each with its shard of both models (FSDP2), for tests without Ray."""

import os
import socket
from contextlib import contextmanager
from pathlib import Path

import torch
from gkd_trainers import LONG, heldout, new_parent, random_child, random_tokens
from torch import distributed

from puzzle_ray.distill import sharded_checkpoint
from puzzle_ray.distill.gkd_trainer import GkdTrainer
from puzzle_ray.distill.recomputing import recompute_layers
from puzzle_ray.distill.sharded_checkpoint import FolderCheckpoints
from puzzle_ray.distill.sharding import Shards
from puzzle_ray.models.child import save_child

STEPS = {"tied": 50, "untied": 12}  # by kind of head
CONFIGS = {
    kind: LONG.model_copy(update={"num_workers": 2, "tokens": count * 128, "average_weights": kind == "untied"})
    for kind, count in STEPS.items()
}


def save_models(folder, tied):
    """A parent and a random child of it, as folders."""
    parent = new_parent(tied=tied)
    parent.save_pretrained(folder / "parent")
    save_child(random_child(parent), folder / "parent", folder / "child")


@contextmanager
def group(folder, rank, size):
    """This process is one of `size` that meet over a file in `folder`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet-{size}", rank=rank, world_size=size)
    try:
        yield
    finally:
        distributed.destroy_process_group()
        torch.set_num_threads(threads)


def sharded_trainer(folder, half=None, **changes):
    """The trainer of this process of the group, watched on held-out text."""
    config = CONFIGS[folder.name].model_copy(update=changes)
    rank, size = distributed.get_rank(), distributed.get_world_size()
    shards = Shards(torch.device("cpu"))
    parent, child = shards.load(folder / "parent", torch.float32), shards.load(folder / "child", torch.float32, half)
    if config.activation_checkpointing:
        recompute_layers(child)
    ranks = range(rank, config.num_workers, size)
    trainer = GkdTrainer(
        child, parent, random_tokens(), config, seed=3, ranks=ranks, all_reduce=distributed.all_reduce, shards=shards
    )
    trainer.watch(heldout())
    return trainer


def steps(trainer, until):
    """Trains on to a step; held-out text is looked at before the first one and after the last."""
    if not trainer.guard.rows:
        trainer.guard.look(0)
    while trainer.next_step < until:
        trainer.step()
    if trainer.next_step == trainer.total_steps:
        trainer.guard.look(until)


def distil(rank, size, folder):
    """Each child of `folder`: to the end with a checkpoint half way, then again from the checkpoint. Curves and weights go into files."""
    folder = Path(folder)
    sharded_checkpoint.MAX_FILE_BYTES = 20_000  # so that there are several files of each process
    with group(folder, rank, size):
        for kind, count in STEPS.items():
            models = folder / kind
            first = sharded_trainer(models)
            kept = FolderCheckpoints(models / "checkpoint")
            steps(first, count // 2)
            kept.save(first)
            distributed.barrier()
            steps(first, count)
            second = sharded_trainer(models)
            kept.load(second)
            taken_up = second.next_step
            steps(second, count)
            found = [(t.curve, t.guard.rows, dict(t.shards.whole_tensors(t.parameters))) for t in (first, second)]
            again, half = sharded_trainer(models, activation_checkpointing=True), sharded_trainer(models, torch.bfloat16)
            found += [(again.step(), taken_up), half.step()]
            if rank == 0:
                torch.save(found, models / "found.pt")
