"""The true damage of whole children, measured in one process that holds the parent. Library blocks replace the parent's layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from puzzle_ray.artifacts import Choices, LayerChoice, Measured
from puzzle_ray.distill.library import Library
from puzzle_ray.models.blocks import LayerStack, swapped
from puzzle_ray.scoring.metrics import PredictionMetrics, compare_predictions, mean, standard_error

BLOCKS_PER_LAYER = 3  # blocks held in memory per layer of the model, because local search comes back to them


class ChildMeter:
    """Measures children on fixed batches of token ids, `[sequences, tokens]`.

    Layers from the first on that a child has in common with the child measured before it are not run again. The result has the same
    bits as the whole forward.
    """

    def __init__(self, stack: LayerStack, library: Library, batches: Sequence[Tensor]) -> None:
        self.stack, self.library, self.batches = stack, library, [ids.to(stack.device) for ids in batches]
        self.blocks: OrderedDict[tuple[int, LayerChoice], nn.Module] = OrderedDict()
        self.last: Choices | None = None
        # of the last measured child, per batch: the input of every layer, and the output of the last one
        self.inputs: list[list[Tensor]] = [[] for _ in self.batches]
        self.parent_log_probs = [F.log_softmax(logits.float(), dim=-1) for logits in self._logits((LayerChoice(),) * stack.last)]
        pairs = zip(self.parent_log_probs, self.batches, strict=True)
        self.parent_loss = mean(PredictionMetrics.joined([compare_predictions(own, own, ids) for own, ids in pairs]).lm_loss)

    @torch.no_grad()
    def measure(self, choices: Choices) -> Measured:
        """Compares one child with the parent; see `Measured`."""
        triples = zip(self.parent_log_probs, self._logits(choices), self.batches, strict=True)
        metrics = PredictionMetrics.joined([compare_predictions(parent, logits, ids) for parent, logits, ids in triples])
        loss, agreement = mean(metrics.lm_loss) - self.parent_loss, mean(metrics.top1_agreement)
        return Measured(mean(metrics.kl), standard_error(metrics.kl), loss, agreement, metrics.tokens)

    @torch.no_grad()
    def _logits(self, choices: Choices) -> list[Tensor]:
        """The logits of every batch, `[sequences, tokens, vocab_size]`."""
        same = 0
        while self.last is not None and same < len(choices) and choices[same] == self.last[same]:
            same += 1
        logits = []
        for ids, inputs in zip(self.batches, self.inputs, strict=True):
            hidden = inputs[same] if inputs else self.stack.embed(ids)
            inputs[same:] = [hidden]
            for index in range(same, len(choices)):
                hidden = self.stack.run_layer(self._block(index, choices[index]), index, hidden)
                inputs.append(hidden)
            logits.append(self.stack.logits(hidden))
        self.last = choices
        return logits

    def _block(self, index: int, choice: LayerChoice) -> nn.Module:
        layer = self.stack.layer(index)
        if choice == LayerChoice():
            return layer
        if (index, choice) not in self.blocks:
            states = self.library.states(index, choice)
            self.blocks[index, choice] = swapped(layer, choice, self.stack.descriptor, self.stack.config, states)
            if len(self.blocks) > BLOCKS_PER_LAYER * self.stack.last:
                self.blocks.popitem(last=False)
        self.blocks.move_to_end((index, choice))
        return self.blocks[index, choice]
