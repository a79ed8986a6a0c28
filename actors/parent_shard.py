"""A run of the parent's layers in a process of its own: streams activations for BLD, exchanges blocks for scoring."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from puzzle_ray.artifacts import SearchSpace
from puzzle_ray.config import ScoringConfig
from puzzle_ray.scoring.downstream import QuestionBatch
from puzzle_ray.scoring.fisher import Found
from puzzle_ray.scoring.items import Damage, Task
from puzzle_ray.store import Step
from puzzle_ray.transport import Container


@dataclass(frozen=True)
class EvaluationData:
    """What all shards score on: token ids `[batch, tokens]` of each text batch, and batches of questions."""

    texts: Sequence[Container]
    questions: Sequence[QuestionBatch]


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

    def run_parent(self, data: EvaluationData, entering: Sequence[Container]) -> list[Container]:
        """Prepares scoring: remembers the parent's activations; returns what the next shard is entered with."""
        import torch

        from puzzle_ray.scoring.replace_one import ShardScorer
        from puzzle_ray.transport import pack, unpack

        self.scorer = ShardScorer(self.stack, [torch.from_numpy(batch.copy()) for batch in data.texts], data.questions)
        first = self.stack.embedding is not None
        batches = self.scorer.input_ids if first else [unpack(batch, torch.float32) for batch in entering]
        return [pack(batch, torch.float32) for batch in self.scorer.run_parent(batches)]

    def exchange(self, task: Task, library: Step, data: EvaluationData, entering: Sequence[Container]) -> Any:
        """Scores exchanges as far as this shard reaches: hidden states for the next shard, or at the end the damage."""
        from puzzle_ray.distill.library import Library

        if self.scorer is None:  # this process was restarted
            self.run_parent(data, entering)
        return self._leave(task, self.scorer.exchange(task, Library(library).states))

    def suffix(self, task: Task, damaged: Sequence[Container], data: EvaluationData, entering: Sequence[Container]) -> Any:
        """The same for a shard behind the one that exchanged."""
        import torch

        from puzzle_ray.transport import unpack

        if self.scorer is None:
            self.run_parent(data, entering)
        return self._leave(task, self.scorer.suffix([unpack(batch, torch.float32) for batch in damaged]))

    def _leave(self, task: Task, leaving: Sequence[Any]) -> list[Container] | list[Damage]:
        import torch

        from puzzle_ray.transport import pack

        if not self.scorer.ends:
            return [pack(batch, torch.float32) for batch in leaving]
        damage: list[Damage] = self.scorer.measure(task, leaving)
        return damage

    def estimate(
        self,
        batches: Sequence[int],
        gradients: Sequence[Sequence[Container]] | None,
        space: SearchSpace,
        config: ScoringConfig,
        library: Step,
        data: EvaluationData,
        entering: Sequence[Container],
    ) -> tuple[Found, list[list[Container]]]:
        """Fisher estimates of this shard's candidates, and the gradients that the shard before it needs. Two returns."""
        import torch

        from puzzle_ray.distill.library import Library
        from puzzle_ray.scoring.fisher import shard_estimates
        from puzzle_ray.transport import pack, unpack

        if self.scorer is None:
            self.run_parent(data, entering)
        given = [[unpack(g, torch.float32) for g in samples] for samples in gradients] if gradients is not None else None
        found, before = shard_estimates(self.scorer, batches, given, space, config, Library(library).states)
        if self.stack.embedding is not None:  # nobody asks for them
            return found, []
        return found, [[pack(g, torch.float32) for g in samples] for samples in before]


@ray.remote(max_restarts=-1, max_task_retries=-1)  # every call brings what it needs, so any retry is safe
class ParentShard(Shard):
    """A shard as an actor."""


def environment(num_threads: int) -> Mapping[str, Any]:
    """Of every computing actor: as many threads as it has cores, and idle ones that do not spin."""
    return {"env_vars": {"OMP_NUM_THREADS": str(num_threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}}
