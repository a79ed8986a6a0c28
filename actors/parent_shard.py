"""A run of the parent's layers in a process of its own: streams activations for BLD, exchanges blocks for scoring and the pick."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import ray

from actors.metrics import note_gpu_memory
from actors.names import layers_in_words
from actors.transport import Container, unpacked_positions
from puzzle_ray.artifacts import Choices, Measured, SearchSpace
from puzzle_ray.scoring.downstream import QuestionBatch
from puzzle_ray.scoring.fisher import Estimates
from puzzle_ray.scoring.replacements import Damage, ScoringTask
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.store import Artifact


@dataclass(frozen=True)
class EvaluationData:
    """What all shards score on: token ids `[batch, tokens]` of each text batch, and batches of questions.

    `separator` is the token that the text's documents begin with, where attention does not cross them.
    """

    texts: Sequence[Container]
    questions: Sequence[QuestionBatch]
    separator: int | None = None


@dataclass(frozen=True)
class ShardUsage:
    """What a shard's process has taken since it started."""

    weights_bytes: int  # read from the checkpoint, as they are held
    peak_rss_bytes: int
    peak_gpu_bytes: int  # allocated there; 0 on a CPU
    sent_bytes: int  # of hidden states by `forward`
    sent_tokens: int


class Shard:
    """Layers `first .. last` of a parent. Stateless but for caches that are rebuilt from what every call brings along."""

    def __init__(
        self,
        parent: str,
        first: int,
        last: int,
        dtype: str,
        activation_dtype: str,
        num_threads: int,
        transport: str,
        num_gpus: float = 0,
        tf32: bool = False,
    ) -> None:
        import torch

        from actors.transport import find_transport
        from puzzle_ray.models.blocks import load_stack
        from puzzle_ray.models.checkpoint import locate
        from puzzle_ray.models.child import read_config
        from puzzle_ray.models.describe import describe
        from puzzle_ray.process import allow_tf32, compute_with, device_for

        self.words = layers_in_words(
            range(first, last)
        )  # first: Ray asks for the words of an actor whose constructor raised, too
        compute_with(num_threads)
        allow_tf32(tf32)
        device = device_for(num_gpus)
        folder = locate(parent)
        config = read_config(folder)
        self.stack = load_stack(folder, describe(config), config, first, last, getattr(torch, dtype), device=device)
        self.travels = getattr(torch, activation_dtype)
        self.transport = find_transport(transport)
        self.sent_bytes = self.sent_tokens = 0
        self.scorer: Any = None
        self.meter: Any = None

    def __repr__(self) -> str:
        return f"ParentShard({self.words})"

    def pid(self) -> int:
        return os.getpid()

    def node(self) -> str:
        """The id of the node this runs on."""
        return ray.get_runtime_context().get_node_id()

    def usage(self) -> ShardUsage:
        """Weights that are used twice count once; Linux counts resident memory in KiB, macOS in bytes."""
        import torch

        held = {tensor.data_ptr(): tensor.nbytes for tensor in self.stack.state_dict().values()}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        on_gpu = torch.cuda.max_memory_allocated(self.stack.device) if self.stack.device.type == "cuda" else 0
        return ShardUsage(sum(held.values()), peak, on_gpu, self.sent_bytes, self.sent_tokens)

    def forward(self, entering: Container, position_ids: Container | None = None) -> list[Container]:
        """Token ids (first shard) or hidden states in; every layer's output out, behind the embedding's for the first shard.

        `position_ids`, int32 of the shape of the ids, say where documents begin (see `puzzle_ray.data.packing`). As an actor method,
        call it with `num_returns` = layers (+ 1 for the first shard): each hidden state is put once.
        """
        import torch

        with torch.inference_mode():
            states = self._states(entering, position_ids)
            first = next(states)
            ours = states if self.stack.embedding is None else chain([first], states)  # what entered is there already
            leaving = self.transport.pack_all(ours, self.travels)
        self._sent_some(leaving)
        return leaving if len(leaving) > 1 else leaving[0]

    def _states(self, entering: Container, position_ids: Container | None) -> Iterator[Any]:
        """The input of the first layer and every layer's output, on the device, rounded as they travel; in inference mode."""
        import torch

        known = unpacked_positions(position_ids, self.stack.device)
        if self.stack.embedding is not None:
            hidden = self.stack.embed(torch.from_numpy(entering.copy()).to(self.stack.device), known).to(self.travels)
        else:
            hidden = self._arrived(entering, self.travels)
        yield hidden
        for index in range(self.stack.first, self.stack.last):
            entered = hidden.to(self.stack.dtype)  # rounded as it travels, so that where shards end makes no difference
            hidden = self.stack.run_layer(self.stack.layer(index), index, entered, position_ids=known).to(self.travels)
            yield hidden

    def _sent_some(self, leaving: Sequence[Container]) -> None:
        """Counts hidden states of one micro-batch that leave this process."""
        self.sent_bytes += sum(packed.nbytes for packed in leaving)
        self.sent_tokens += leaving[-1].shape[0] * leaving[-1].shape[1] if leaving else 0
        note_gpu_memory(f"parent shard, {self.words}", self.stack.device)

    def _arrived(self, packed: Container, dtype: Any) -> Any:
        """A tensor that was sent here, where this shard computes."""
        return self.transport.unpack(packed, dtype).to(self.stack.device)

    def room(self, least: int | None = None) -> int | None:
        """Bytes that are free on this shard's GPU, or `least` where that is fewer; None on a CPU."""
        from puzzle_ray.process import free_bytes

        free = free_bytes(self.stack.device)
        return free if least is None or free is None else min(free, least)

    def run_parent(self, batches: Sequence[int], data: EvaluationData, entering: Sequence[Container]) -> list[Container]:
        """Remembers the parent's activations on a chunk of batches; returns what the next shard is entered with."""
        import torch

        from puzzle_ray.scoring.shard import ShardScorer

        if self.scorer is None:
            texts = [torch.from_numpy(batch.copy()) for batch in data.texts]
            self.scorer = ShardScorer(self.stack, texts, data.questions, data.separator)
        arrived = [self._arrived(batch, self.stack.dtype) for batch in entering]
        return self._sent(self.scorer.run_parent(arrived, batches))

    def _remember(self, batches: Sequence[int], data: EvaluationData, entering: Sequence[Container]) -> None:
        """Runs the parent on a chunk unless this process has done it: it may have been restarted, or have worked on another one."""
        if self.scorer is None or not self.scorer.remembers(batches):
            self.run_parent(batches, data, entering)

    def exchange(
        self, task: ScoringTask, library: Artifact, batches: Sequence[int], data: EvaluationData, entering: Sequence[Container]
    ) -> Any:
        """Scores exchanges as far as this shard reaches: hidden states for the next shard, or at the end the damage.

        `batches` are the chunk that the task's batches are part of, and `entering` is the parent's input of this shard for it.
        """
        from puzzle_ray.distill.library import Library

        self._remember(batches, data, entering)
        return self._leave(task, self.scorer.run_replacements(task, Library(library).states))

    def suffix(
        self,
        task: ScoringTask,
        damaged: Sequence[Container],
        batches: Sequence[int],
        data: EvaluationData,
        entering: Sequence[Container],
    ) -> Any:
        """The same for a shard behind the one that exchanged."""
        self._remember(batches, data, entering)
        return self._leave(task, self.scorer.run_suffix(task, [self._arrived(batch, self.stack.dtype) for batch in damaged]))

    def _leave(self, task: ScoringTask, leaving: Sequence[Any]) -> list[Container] | list[list[Damage]]:
        if not self.scorer.ends:
            return [self.transport.pack(batch, self.stack.dtype) for batch in leaving]
        damage: list[list[Damage]] = self.scorer.measure(task, leaving)
        return damage

    def estimate(
        self,
        own: Sequence[int],
        gradients: Sequence[Sequence[Container]] | None,
        space: SearchSpace,
        config: ScoringConfig,
        library: Artifact,
        batches: Sequence[int],
        data: EvaluationData,
        entering: Sequence[Container],
    ) -> tuple[Estimates, list[list[Container]]]:
        """Fisher estimates of this shard's candidates on batches `own` of a chunk, and the gradients that the shard before it needs.

        Two returns.
        """
        from puzzle_ray.distill.library import Library
        from puzzle_ray.scoring.fisher import shard_estimates

        self._remember(batches, data, entering)
        dtype = self.stack.dtype
        given = [[self._arrived(g, dtype) for g in samples] for samples in gradients] if gradients is not None else None
        found, before = shard_estimates(self.scorer, own, given, space, config, Library(library).states)
        if self.stack.embedding is not None:  # nobody asks for them
            return found, []
        return found, [[self.transport.pack(g, dtype) for g in samples] for samples in before]

    # measuring whole children

    def remember_parent(
        self, library: Artifact, ids: Sequence[Container], entering: Sequence[Container], separator: int | None = None
    ) -> list[Container]:
        """Prepares measuring: remembers the parent's predictions on batches of token ids. Returns the next shard's input.

        `separator` is as of `EvaluationData`.
        """
        import torch

        from puzzle_ray.distill.library import Library
        from puzzle_ray.evaluation.child_meter import ShardMeter

        batches = [torch.from_numpy(batch.copy()) for batch in ids]
        self.meter = ShardMeter(self.stack, Library(library), batches, separator=separator)
        leaving = self.meter.remember_parent([self._arrived(batch, self.stack.dtype) for batch in entering])
        return self._sent(leaving)

    def run_child(
        self,
        choices: Choices,
        entering: Sequence[Container],
        library: Artifact,
        ids: Sequence[Container],
        parent_entering: Sequence[Container],
        separator: int | None = None,
    ) -> list[Container] | Measured:
        """Runs this shard's layers of a child. Returns the next shard's input, or at the end what was measured."""
        if self.meter is None:  # this process was restarted
            self.remember_parent(library, ids, parent_entering, separator)
        leaving = self.meter.run(choices, [self._arrived(batch, self.stack.dtype) for batch in entering])
        measured: Measured | None = self.meter.compare(leaving) if self.stack.head is not None else None
        return self._sent(leaving) if measured is None else measured

    def _sent(self, leaving: Sequence[Any]) -> list[Container]:
        """What travels of hidden states; nothing leaves the last shard."""
        if self.stack.head is not None:
            return []
        return [self.transport.pack(batch, self.stack.dtype) for batch in leaving]


@ray.remote(max_restarts=-1, max_task_retries=-1)  # every call brings what it needs, so any retry is safe
class ParentShard(Shard):
    """A shard as an actor."""
