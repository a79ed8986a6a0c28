"""A run of the parent's layers in a process of its own: streams activations for BLD, exchanges blocks for scoring."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from puzzle_ray.artifacts import ScoreRow
from puzzle_ray.scoring.replace_one import Item
from puzzle_ray.store import Step
from puzzle_ray.transport import Container


class Shard:
    """Layers `first .. last` of a parent. Stateless but for caches that are rebuilt from what every call brings along."""

    def __init__(self, parent: str, first: int, last: int, dtype: str, activation_dtype: str, num_threads: int) -> None:
        import torch

        from puzzle_ray.blocks import load_stack
        from puzzle_ray.checkpoint import locate, read_config
        from puzzle_ray.families import describe

        torch.set_num_threads(num_threads)
        folder = locate(parent)
        config = read_config(folder)
        self.stack = load_stack(folder, describe(config), config, first, last, getattr(torch, dtype))
        self.travels = getattr(torch, activation_dtype)
        self.scorer: Any = None

    def pid(self) -> int:
        return os.getpid()

    def forward(self, entering: Container) -> list[Container]:
        """Token ids (first shard) or hidden states in; every layer's output out, behind the embedding's for the first shard.

        As an actor method, call it with `num_returns` = layers (+ 1 for the first shard): each hidden state is put once.
        """
        import torch

        from puzzle_ray.transport import pack, unpack

        with torch.inference_mode():
            if self.stack.embedding is not None:
                hidden = self.stack.embed(torch.from_numpy(entering.copy()))
                leaving = [pack(hidden, self.travels)]
            else:
                hidden, leaving = unpack(entering, self.travels), []
            hidden = hidden.to(next(self.stack.parameters()).dtype)
            for index in range(self.stack.first, self.stack.last):
                hidden = self.stack.run_layer(self.stack.layer(index), index, hidden)
                leaving.append(pack(hidden, self.travels))
        return leaving if len(leaving) > 1 else leaving[0]  # type: ignore[return-value]

    def run_parent(self, ids: Sequence[Container], entering: Sequence[Container]) -> list[Container]:
        """Prepares scoring: remembers the parent's activations; returns what the next shard is entered with."""
        import torch

        from puzzle_ray.scoring.replace_one import ShardScorer
        from puzzle_ray.transport import pack, unpack

        self.scorer = ShardScorer(self.stack, [torch.from_numpy(batch.copy()) for batch in ids])
        first = self.stack.embedding is not None
        batches = self.scorer.input_ids if first else [unpack(batch, torch.float32) for batch in entering]
        return [pack(batch, torch.float32) for batch in self.scorer.run_parent(batches)]

    def exchange(self, item: Item, library: Step, ids: Sequence[Container], entering: Sequence[Container]) -> Any:
        """Scores one exchange as far as this shard reaches: hidden states for the next shard, or at the end the rows."""
        from puzzle_ray.distill.library import Library

        if self.scorer is None:  # this process was restarted
            self.run_parent(ids, entering)
        return self._leave(item, self.scorer.exchange(item, Library(library).states(item.layer, item.choice)))

    def suffix(self, item: Item, damaged: Sequence[Container], ids: Sequence[Container], entering: Sequence[Container]) -> Any:
        """The same for a shard behind the one that exchanged."""
        import torch

        from puzzle_ray.transport import unpack

        if self.scorer is None:
            self.run_parent(ids, entering)
        return self._leave(item, self.scorer.suffix([unpack(batch, torch.float32) for batch in damaged]))

    def _leave(self, item: Item, leaving: Sequence[Any]) -> list[Container] | list[ScoreRow]:
        import torch

        from puzzle_ray.scoring.replace_one import rows_of
        from puzzle_ray.transport import pack

        if not self.scorer.ends:
            return [pack(batch, torch.float32) for batch in leaving]
        return rows_of(item, self.scorer.measure(leaving), self.scorer.parent_loss())


@ray.remote(max_restarts=-1, max_task_retries=-1)  # every call brings what it needs, so any retry is safe
class ParentShard(Shard):
    """A shard as an actor."""


def environment(num_threads: int) -> Mapping[str, Any]:
    """Of every computing actor: as many threads as it has cores, and idle ones that do not spin."""
    return {"env_vars": {"OMP_NUM_THREADS": str(num_threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}}
