"""Trains the variants of one or several layers in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence

import ray

from actors.metrics import note_gpu_memory
from actors.names import part_in_words
from actors.transport import Container, unpacked_positions
from puzzle_ray.artifacts import SearchSpace
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.store import Artifact


class Trainer:
    """Layers `layers` of the library, or with `part` a part of their variants. Continues from checkpoints when it is started again."""

    def __init__(
        self,
        parent: str,
        layers: Sequence[int],
        space: SearchSpace,
        config: LibraryConfig,
        artifact: Artifact,
        num_threads: int,
        transport: str,
        num_gpus: float = 0,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        import torch

        from actors.transport import find_transport
        from puzzle_ray.distill.library import GroupTrainer
        from puzzle_ray.process import device_for

        self.words = part_in_words(layers, part)  # first: Ray asks for the words of an actor whose constructor raised, too
        self.device = device_for(num_gpus)
        self.transport = find_transport(transport)
        self.travels = getattr(torch, config.activation_dtype)
        self.group = GroupTrainer(parent, layers, space, config, artifact, num_threads, self.device, part)

    def __repr__(self) -> str:
        return f"BlockTrainer({self.words})"

    def pid(self) -> int:
        return os.getpid()

    def node(self) -> str:
        """The id of the node this runs on."""
        return ray.get_runtime_context().get_node_id()

    def last(self) -> int:
        """The last position all layers here have done."""
        return self.group.last

    def save(self) -> None:
        """Writes a checkpoint of every variant here."""
        self.group.save()

    def step(
        self, position: int, indices: Sequence[int], *hidden_states: Container, position_ids: Container | None = None
    ) -> float | None:
        """One micro-batch: `hidden_states[n]` is the input of layer `indices[n]`. Raises OutOfOrder for a gap.

        `position_ids` are as of `Shard.forward`.
        """
        arrived = [self.transport.unpack(h, self.travels) for h in hidden_states]
        tensors = {i: tensor.to(self.device).float() for i, tensor in zip(indices, arrived, strict=True)}
        loss = self.group.step(position, tensors, unpacked_positions(position_ids, self.device))
        note_gpu_memory(f"block trainer, {self.words}", self.device)
        return loss


@ray.remote(max_restarts=-1, max_task_retries=0)  # a lost step is not retried: the driver goes back to what the checkpoint knows
class BlockTrainer(Trainer):
    """A trainer as an actor."""
