"""Replace-one scores (paper, section 3.3): one layer is exchanged, the others stay the parent's, and the damage is measured.

Only layers from the exchanged one on run again: what comes before is the parent's and is kept. The result is bitwise that of the
whole forward. Work is cut at shard borders, so that a model spread over processes is scored the same way as one in a single process.
Several candidates of one layer may share the way through the layers behind it, one behind the other along the batch: the values are
then those of one at a time up to the rounding of larger matrix products (about 1e-6), no longer bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from puzzle_ray.artifacts import LayerChoice, SubblockKind
from puzzle_ray.models.blocks import LayerStack, swapped
from puzzle_ray.scoring.downstream import QuestionBatch, answers
from puzzle_ray.scoring.items import DOWNSTREAM, Damage, ScoringTask
from puzzle_ray.scoring.metrics import compare, next_token_loss

States = Mapping[SubblockKind, Mapping[str, Tensor]]
StatesOf = Callable[[int, LayerChoice], States]


@dataclass(frozen=True)
class Kept:
    """What the last shard remembers of the parent's predictions on one batch of text, or of questions."""

    log_probs: Tensor | None = None  # [batch, tokens, vocab_size]
    hidden: Tensor | None = None  # behind the final norm, [batch, tokens, hidden_size]
    loss: tuple[float, ...] = ()
    gold_log_prob: tuple[float, ...] = ()


class ShardScorer:
    """A shard's part in scoring. Inputs and outputs are one tensor per evaluation batch, `[batch, tokens, hidden_size]`.

    Batches are numbered through: text first, then questions.
    """

    def __init__(self, stack: LayerStack, texts: Sequence[Tensor], questions: Sequence[QuestionBatch] = ()) -> None:
        self.stack, self.questions, self.num_texts = stack, list(questions), len(texts)
        ids = [*texts, *(torch.from_numpy(batch.input_ids.copy()) for batch in questions)]
        self.input_ids = [batch.to(stack.device) for batch in ids]
        self.inputs: list[dict[int, Tensor]] = []  # per batch: layer -> the parent's input; behind the last one, its output
        self.parent: list[Kept] = []
        self.ends = stack.head is not None

    @torch.no_grad()
    def run_parent(self, entering: Sequence[Tensor]) -> list[Tensor]:
        """Remembers the parent's activations of these layers; returns what leaves the shard. The first shard takes token ids."""
        self.inputs, self.parent = [], []
        for number, hidden_states in enumerate(entering):
            hidden = self.stack.embed(hidden_states) if self.stack.embedding is not None else hidden_states
            kept = {}
            for index in range(self.stack.first, self.stack.last):
                kept[index] = hidden
                hidden = self.stack.run_layer(self.stack.layer(index), index, hidden)
            kept[self.stack.last] = hidden
            self.inputs.append(kept)
            if self.ends:
                self.parent.append(self._keep(number, hidden))
        return [kept[self.stack.last] for kept in self.inputs]

    def _keep(self, number: int, leaving: Tensor) -> Kept:
        final, logits = self.stack.predict(leaving)
        if number >= self.num_texts:
            return Kept(gold_log_prob=answers(logits, self.questions[number - self.num_texts]).gold_log_prob)
        log_probs = F.log_softmax(logits.float(), dim=-1)
        return Kept(log_probs, final, tuple(next_token_loss(log_probs, self.input_ids[number]).tolist()))

    @torch.no_grad()
    def exchange(self, task: ScoringTask, states_of: StatesOf) -> list[Tensor]:
        """The exchanged layers on the parent's input to them, one behind the other along the batch; then the rest of this shard."""
        stack, index = self.stack, task.layer
        layers = [
            swapped(stack.layer(index), item.choice, stack.descriptor, stack.config, states_of(index, item.choice))
            for item in task.items
        ]
        started = []
        for number in task.batches:
            outputs = [stack.run_layer(layer, index, self.inputs[number][index]) for layer in layers]
            started.append(torch.cat(outputs) if len(outputs) > 1 else outputs[0])
        return self._run_rest(started, index + 1)

    @torch.no_grad()
    def suffix(self, entering: Sequence[Tensor]) -> list[Tensor]:
        """All layers of this shard on activations that a damaged layer before it made."""
        return self._run_rest(entering, self.stack.first)

    def _run_rest(self, entering: Iterable[Tensor], first: int) -> list[Tensor]:
        leaving = []
        for hidden in entering:
            for index in range(first, self.stack.last):
                hidden = self.stack.run_layer(self.stack.layer(index), index, hidden)
            leaving.append(hidden)
        return leaving

    @torch.no_grad()
    def measure(self, task: ScoringTask, leaving: Sequence[Tensor]) -> list[Damage]:
        """What the last shard says of final hidden states: one for every candidate of the task."""
        parts: list[list[Damage]] = [[] for _ in task.items]
        for number, hidden in zip(task.batches, leaving, strict=True):
            for found, own in zip(parts, hidden.split(len(self.input_ids[number])), strict=True):
                found.append(self._damage(number, own))
        return [Damage.joined(found) for found in parts]

    def _damage(self, number: int, leaving: Tensor) -> Damage:
        final, logits = self.stack.predict(leaving)
        kept, ids = self.parent[number], self.input_ids[number]
        if number >= self.num_texts:
            found = answers(logits, self.questions[number - self.num_texts]).gold_log_prob
            lost = tuple(p - c for p, c in zip(kept.gold_log_prob, found, strict=True))
            return Damage({DOWNSTREAM: lost}, {DOWNSTREAM: int(ids.numel())})
        assert kept.log_probs is not None
        return Damage.of(compare(kept.log_probs, logits, ids, kept.hidden, final), kept.loss)
