"""A checkpoint of which every process writes its shard, and which any number of processes reads.

It is a folder: `shards/` has safetensors files of each process, with the offset of every part in its header, written and read by
torch.distributed.checkpoint; `run.safetensors` has what is small. Its plain format would have a pickle beside the shards, the one of
Hugging Face files has none. Nothing is ever gathered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from puzzle_ray.distill.gkd_trainer import GkdTrainer
from puzzle_ray.errors import StoreError

SHARDS, RUN = "shards", "run.safetensors"
MAX_FILE_BYTES = 1 << 28


def save_shards(trainer: GkdTrainer, folder: Path) -> None:
    """Writes what is this process's of a training into `folder`, which may be another one in every process. All must call it."""
    from safetensors.torch import save_file

    target, tensors = folder / SHARDS, trainer.weight_tensors()
    target.mkdir(parents=True, exist_ok=True)
    writer = HuggingFaceStorageWriter(str(target), _file_numbers(tensors), save_distributed=True)
    save(tensors, storage_writer=writer)
    if distributed.get_rank() == 0:
        save_file(trainer.small_tensors(), folder / RUN)


def _file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """In which of its files a process writes its part of a tensor: one file at a time is copied, so files are bounded."""
    numbers, number, held = {}, 1, 0
    for name, value in tensors.items():
        size = value.numel() * value.element_size() // distributed.get_world_size()
        if held and held + size > MAX_FILE_BYTES:
            number, held = number + 1, 0
        numbers[name], held = number, held + size
    return numbers


@torch.no_grad()
def load_shards(trainer: GkdTrainer, folder: Path) -> None:
    """Continues from `folder`, which has the files of all processes that wrote it. All processes must call it.

    Raises StoreError where a file is missing, or where shapes belong to another child.
    """
    from safetensors.torch import load_file

    reader = HuggingFaceStorageReader(str(folder / SHARDS))
    if not (folder / RUN).is_file():
        raise StoreError("checkpoint", f"{folder} has no {RUN}", "remove the checkpoint")
    trainer.load_small_tensors(load_file(folder / RUN))
    wanted = trainer.weight_tensors()
    found = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        parts = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
        found[name] = tuple(stored.size) if parts == math.prod(stored.size) else f"incomplete ({parts} numbers)"
    expected = {name: tuple(value.shape) for name, value in wanted.items()}
    if found != expected:
        name = min(name for name, _ in found.items() ^ expected.items())
        problem = f"{folder}: {name} is {found.get(name)}, this child has {expected.get(name)}"
        raise StoreError("checkpoint", problem, "remove the checkpoint")
    load(wanted, storage_reader=reader)


class FolderCheckpoints:
    """The last checkpoint in a folder that all processes see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, trainer: GkdTrainer) -> None:
        if (self.folder / RUN).is_file():
            load_shards(trainer, self.folder)

    def save(self, trainer: GkdTrainer) -> None:
        save_shards(trainer, self.folder)
