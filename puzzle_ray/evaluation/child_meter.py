"""The true damage of whole children: library blocks replace the parent's layers, in one process or cut into shards.

Nothing grows with the text but hidden states at shard borders: blocks run over all batches one after the other, and logits exist for a
few tokens at a time. What is remembered of the child measured before has a limit in bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from puzzle_ray.artifacts import Choices, LayerChoice, Measured
from puzzle_ray.data.packing import positions_in_documents
from puzzle_ray.distill.library import Library
from puzzle_ray.models.blocks import LayerStack, swapped
from puzzle_ray.scoring.metrics import PredictionMetrics, compare_heads, mean, parents_own, standard_error

BLOCKS_PER_LAYER = 3  # blocks held in memory per layer of the model, because local search comes back to them
KEPT_BYTES = 256 << 20  # of such blocks, and of hidden states of the last child; twice this in all


class ShardMeter:
    """One shard's part in measuring children on fixed batches of token ids, `[sequences, tokens]`.

    Layers from the first on that a child has in common with the child measured before it are not run again. The result has the same
    bits as the whole forward. The parent goes first: see `remember_parent`. `separator` is the token that documents begin with, where
    attention does not cross them (see `puzzle_ray.data.packing`).
    """

    def __init__(
        self,
        stack: LayerStack,
        library: Library,
        batches: Sequence[Tensor],
        kept_bytes: int = KEPT_BYTES,
        separator: int | None = None,
    ) -> None:
        self.stack, self.library, self.kept_bytes = stack, library, kept_bytes
        self.batches = [ids.to(stack.device) for ids in batches]
        self.position_ids = [positions_in_documents(ids, separator) for ids in self.batches]
        self.blocks: OrderedDict[tuple[int, LayerChoice], nn.Module] = OrderedDict()
        self.last: Choices | None = None
        # of the last measured child, for as many batches as there is room for: the input of every layer, and the output of the last one
        self.inputs: list[dict[int, Tensor]] = [{} for _ in self.batches]
        self.parent_final: list[Tensor] = []  # of the last shard, per batch: the output of the parent's final norm
        self.parent_loss = 0.0

    @torch.no_grad()
    def remember_parent(self, entering: Sequence[Tensor] = ()) -> list[Tensor]:
        """Runs the parent. `entering` and what is returned are as in `run`."""
        leaving = self.run((LayerChoice(),) * self.stack.config.num_hidden_layers, entering)
        if self.stack.head is not None:
            self.parent_final = [self.stack.final(hidden) for hidden in leaving]
            pairs, head = zip(self.batches, self.parent_final, strict=True), self.stack.output_head
            self.parent_loss = mean(PredictionMetrics.joined([parents_own(head, ids, own) for ids, own in pairs]).lm_loss)
        return leaving

    @torch.no_grad()
    def run(self, choices: Choices, entering: Sequence[Tensor] = ()) -> list[Tensor]:
        """Runs this shard's layers of a child. `choices` are those of all layers.

        `entering` has the hidden states that enter the shard, one tensor per batch; the first shard starts from its token ids. Returns
        the output of the shard's last layer, one tensor per batch.
        """
        stack, same = self.stack, 0
        while self.last is not None and same < len(choices) and choices[same] == self.last[same]:
            same += 1
        begin = min(max(same, stack.first), stack.last)
        starts, states = [], []
        for number, inputs in enumerate(self.inputs):
            known = begin in inputs and same >= stack.first
            starts.append(begin if known else stack.first)
            begins = stack.embedding is not None and not known
            first = stack.embed(self.batches[number], self.position_ids[number]) if begins else None
            states.append(inputs[begin] if known else entering[number] if first is None else first)
        self.last = None
        self._keep(starts, states, None)
        for index in range(min(starts, default=stack.last), stack.last):
            block = self._block(index, choices[index])
            for number, start in enumerate(starts):
                if start <= index:
                    own = self.position_ids[number]
                    states[number] = stack.run_layer(block, index, states[number], position_ids=own)
            self._keep(starts, states, index)
        self.last = choices
        return states

    def _keep(self, starts: Sequence[int], states: Sequence[Tensor], index: int | None) -> None:
        """Remembers what leaves layer `index`, or what enters the first layer that runs, of the first batches."""
        room = self.kept_bytes
        for number, state in enumerate(states):
            room -= state.nbytes * (len(self.stack.layers) + 1)
            if room < 0:
                return
            place = starts[number] if index is None else index + 1
            if place >= starts[number]:
                self.inputs[number][place] = state

    @torch.no_grad()
    def compare(self, leaving: Sequence[Tensor]) -> Measured:
        """Compares a child with the parent, from the outputs of the last layer; see `Measured`. For the last shard only."""
        head = self.stack.output_head
        triples = zip(self.batches, self.parent_final, leaving, strict=True)
        parts = [compare_heads(head, head, ids, own, self.stack.final(hidden)) for ids, own, hidden in triples]
        metrics = PredictionMetrics.joined(parts)
        loss, agreement = mean(metrics.lm_loss) - self.parent_loss, mean(metrics.top1_agreement)
        return Measured(mean(metrics.kl), standard_error(metrics.kl), loss, agreement, metrics.tokens)

    def _block(self, index: int, choice: LayerChoice) -> nn.Module:
        layer = self.stack.layer(index)
        if choice == LayerChoice():
            return layer
        if (index, choice) not in self.blocks:
            states = self.library.states(index, choice)
            self.blocks[index, choice] = swapped(layer, choice, self.stack.descriptor, self.stack.config, states)
            while len(self.blocks) > 1 and not self._has_room():
                self.blocks.popitem(last=False)
        self.blocks.move_to_end((index, choice))
        return self.blocks[index, choice]

    def _has_room(self) -> bool:
        """Whether all blocks may stay. Subblocks that are the parent's own take no memory of their own."""
        if len(self.blocks) > BLOCKS_PER_LAYER * len(self.stack.layers):
            return False
        own = {parameter.data_ptr() for parameter in self.stack.parameters()}
        new = {p.data_ptr(): p.nbytes for block in self.blocks.values() for p in block.parameters() if p.data_ptr() not in own}
        return sum(new.values()) <= self.kept_bytes


class ChildMeter(ShardMeter):
    """A meter that holds the whole parent, and runs it before the first child."""

    def measure(self, choices: Choices) -> Measured:
        """Compares one child with the parent; see `Measured`."""
        if not self.parent_final:
            self.remember_parent()
        return self.compare(self.run(choices))
