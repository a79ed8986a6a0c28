"""A run of the parent's layers and their trainers in one process: hidden states stay on its device."""

from __future__ import annotations

from typing import Any

import ray

from actors.block_trainer import Trainer
from actors.parent_shard import Shard
from actors.transport import Container, unpacked_positions


class Colocated(Shard):
    """A shard that trains its own layers. Same bits as a shard and trainers in processes of their own.

    `shard` and `trainer` are the arguments of those; `trainer` is None where all layers are finished. On a CPU each computes with
    its own number of threads, one after the other.
    """

    def __init__(self, shard: tuple[Any, ...], trainer: tuple[Any, ...] | None, is_last: bool) -> None:
        super().__init__(*shard)
        self.threads = shard[5]
        self.trainer = None if trainer is None else Trainer(*trainer)
        self.trainer_threads = self.threads if trainer is None else trainer[5]
        self.is_last = is_last

    def __repr__(self) -> str:
        return f"ColocatedShard({self.words})"

    def last(self) -> int:
        """The last position that all layers trained here have done."""
        assert self.trainer is not None
        return self.trainer.last()

    def save(self) -> None:
        """What its layers have learned, before this process is ended."""
        if self.trainer is not None:
            self.trainer.save()

    def forward_and_train(
        self, position: int, entering: Container, position_ids: Container | None = None
    ) -> tuple[Container | None, float | None]:
        """One micro-batch: what the next shard is entered with (None behind the last), and the mean training loss.

        `entering` is token ids for the first shard, else hidden states; `position_ids` are as of `Shard.forward`. Raises OutOfOrder for
        a gap.
        """
        import torch

        torch.set_num_threads(self.threads)
        with torch.inference_mode():
            states = list(self._states(entering, position_ids))
            leaving = None if self.is_last else self.transport.pack(states[-1], self.travels)
        self._sent_some([] if leaving is None else [leaving])
        if self.trainer is None:
            return leaving, None
        torch.set_num_threads(self.trainer_threads)
        own = {index for trainer in self.trainer.group.trainers for index in (trainer.index, trainer.index + 1)}
        # copies: a tensor of inference mode cannot be trained on
        tensors = {index: states[index - self.stack.first].clone().to(self.trainer.device).float() for index in own}
        return leaving, self.trainer.group.step(position, tensors, unpacked_positions(position_ids, self.trainer.device))


@ray.remote(
    max_restarts=-1, max_task_retries=0
)  # as trainers: a lost step is not retried, the driver goes back to the checkpoint
class ColocatedShard(Colocated):
    """A shard with its trainers as an actor."""
