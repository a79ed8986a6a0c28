"""Replace-one scores: one layer is replaced, the others stay the parent's, and the damage is measured. (Paper v5, section 4.2.)

Only the layers from the replaced one on run again. The activations before it are the parent's and are remembered. The result has the
same bits as the whole forward. The work is divided at shard borders, so a model that is spread over processes is scored in the same
way as a model in one process.

Several replacements of one layer may go through the layers behind it together, concatenated along the batch. Their values then equal
those of one replacement at a time up to the rounding of larger matrix products (about 1e-6), and not bit for bit.

The parent's activations and log-probabilities are remembered for one chunk of batches only. Logits of replacements are never whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle_ray.artifacts import LayerChoice, SubblockKind
from puzzle_ray.data.packing import positions_in_documents
from puzzle_ray.distill.losses import next_token_loss_per_sequence
from puzzle_ray.models.blocks import LayerStack, swapped
from puzzle_ray.process import give_back_freed_memory
from puzzle_ray.scoring.downstream import QuestionBatch, answers_from_head
from puzzle_ray.scoring.metrics import compare_with_parent
from puzzle_ray.scoring.replacements import DOWNSTREAM, Damage, ScoringTask

States = Mapping[SubblockKind, Mapping[str, Tensor]]
StatesOf = Callable[[int, LayerChoice], States]


@dataclass(frozen=True)
class ParentPredictions:
    """The parent's predictions on one batch, as the last shard remembers them.

    A batch of text has `log_probs`, `hidden` and `loss`. A batch of questions has `gold_log_prob` only.
    """

    log_probs: Tensor | None = None  # float32, [batch, tokens, vocab_size]
    hidden: Tensor | None = None  # output of the final norm, [batch, tokens, hidden_size]
    loss: tuple[float, ...] = ()  # next-token loss of every sequence
    gold_log_prob: tuple[float, ...] = ()  # of every question


class ShardScorer:
    """One shard's part in scoring.

    Hidden states go in and out as one tensor per evaluation batch, `[batch, tokens, hidden_size]`. Batches are numbered: text batches
    first, then question batches. `texts` are token ids, `[batch, tokens]`. `separator` is the token that their documents begin with, where
    attention does not cross them (see `puzzle_ray.data.packing`); a question is one document.

    It remembers the parent's activations on one chunk of batches, the one that `run_parent` was called with last.
    `inputs[batch][layer]` is the parent's input to that layer, `[batch, tokens, hidden_size]` in the stack's dtype, for every layer of
    the shard. `inputs[batch][stack.last]` is the output of the shard's last layer. `parent` has the predictions, in the last shard.
    """

    def __init__(
        self,
        stack: LayerStack,
        texts: Sequence[Tensor],
        questions: Sequence[QuestionBatch] = (),
        separator: int | None = None,
    ) -> None:
        self.stack, self.questions, self.num_texts, self.separator = stack, list(questions), len(texts), separator
        self.input_ids = [*texts, *(torch.from_numpy(batch.input_ids.copy()) for batch in questions)]
        self.inputs: dict[int, dict[int, Tensor]] = {}
        self.parent: dict[int, ParentPredictions] = {}
        self.ends = stack.head is not None  # whether this is the last shard, which has the final norm and the head

    @property
    def batch_tokens(self) -> list[int]:
        """How many tokens every batch has."""
        return [ids.numel() for ids in self.input_ids]

    def remembers(self, batches: Sequence[int]) -> bool:
        return all(number in self.inputs for number in batches)

    def ids(self, number: int) -> Tensor:
        """The token ids of a batch, where this shard computes."""
        return self.input_ids[number].to(self.stack.device)

    def position_ids(self, number: int, copies: int = 1) -> Tensor | None:
        """Where the documents of a batch begin; of as many copies of it, one behind the other. None where models count themselves."""
        found = positions_in_documents(self.ids(number), self.separator) if number < self.num_texts else None
        return None if found is None else found.repeat(copies, 1)

    @torch.no_grad()
    def run_parent(self, entering: Sequence[Tensor] = (), batches: Sequence[int] | None = None) -> list[Tensor]:
        """Runs the parent on a chunk and remembers its activations, in place of those of the chunk before.

        `batches` are the chunk's, by default all. `entering` has the hidden states that enter the shard, one tensor per batch of the
        chunk; the first shard starts from its own token ids. Returns the output of the shard's last layer, one tensor per batch.
        """
        self.inputs, self.parent = {}, {}
        for place, number in enumerate(range(len(self.input_ids)) if batches is None else batches):
            first, known = self.stack.embedding is not None, self.position_ids(number)
            hidden = self.stack.embed(self.ids(number), known) if first else entering[place]
            inputs = {}
            for index in range(self.stack.first, self.stack.last):
                inputs[index] = hidden
                hidden = self.stack.run_layer(self.stack.layer(index), index, hidden, position_ids=known)
            inputs[self.stack.last] = hidden
            self.inputs[number] = inputs
            if self.ends:
                self.parent[number] = self._predictions(number, hidden)
        give_back_freed_memory()
        return [inputs[self.stack.last] for inputs in self.inputs.values()]

    def _predictions(self, number: int, leaving: Tensor) -> ParentPredictions:
        final, head, ids = self.stack.final(leaving), self.stack.output_head, self.ids(number)
        if number >= self.num_texts:
            questions = self.questions[number - self.num_texts]
            return ParentPredictions(gold_log_prob=answers_from_head(head, final, questions).gold_log_prob)
        log_probs = head.log_probs(final)
        return ParentPredictions(log_probs, final, tuple(next_token_loss_per_sequence(log_probs, ids).tolist()))

    @torch.no_grad()
    def run_replacements(self, task: ScoringTask, states_of: StatesOf) -> list[Tensor]:
        """Runs the replaced layers on the parent's input, and then the rest of this shard.

        The outputs of several replacements are concatenated along the batch. `states_of(layer, choice)` gives their weights. The
        task's batches must be of the chunk that is remembered.
        """
        stack, index = self.stack, task.layer
        layers = [
            swapped(stack.layer(index), r.choice, stack.descriptor, stack.config, states_of(index, r.choice))
            for r in task.replacements
        ]
        leaving = []
        for number in task.batches:
            x, known = self.inputs[number][index], self.position_ids(number)
            outputs = [stack.run_layer(layer, index, x, position_ids=known) for layer in layers]
            leaving.append(torch.cat(outputs) if len(outputs) > 1 else outputs[0])
        return self._run_from(index + 1, task, leaving)

    @torch.no_grad()
    def run_suffix(self, task: ScoringTask, entering: Sequence[Tensor]) -> list[Tensor]:
        """Runs all layers of this shard on the outputs of a shard before it in which a layer was replaced."""
        return self._run_from(self.stack.first, task, entering)

    def _run_from(self, first: int, task: ScoringTask, entering: Iterable[Tensor]) -> list[Tensor]:
        leaving = []
        for number, hidden in zip(task.batches, entering, strict=True):
            known = self.position_ids(number, len(task.replacements))
            for index in range(first, self.stack.last):
                hidden = self.stack.run_layer(self.stack.layer(index), index, hidden, position_ids=known)
            leaving.append(hidden)
        return leaving

    @torch.no_grad()
    def measure(self, task: ScoringTask, leaving: Sequence[Tensor]) -> list[list[Damage]]:
        """The damage of every replacement of the task on every batch, from the outputs of the last layer. For the last shard only."""
        parts: list[list[Damage]] = [[] for _ in task.replacements]
        for number, hidden in zip(task.batches, leaving, strict=True):
            for damages, own in zip(parts, hidden.split(len(self.input_ids[number])), strict=True):
                damages.append(self._damage(number, own))
        return parts

    def _damage(self, number: int, leaving: Tensor) -> Damage:
        final, head = self.stack.final(leaving), self.stack.output_head
        parent, ids = self.parent[number], self.ids(number)
        if number >= self.num_texts:
            child = answers_from_head(head, final, self.questions[number - self.num_texts]).gold_log_prob
            loss = tuple(p - c for p, c in zip(parent.gold_log_prob, child, strict=True))
            return Damage({DOWNSTREAM: loss}, {DOWNSTREAM: int(ids.numel())})
        assert parent.log_probs is not None and parent.hidden is not None
        return Damage.of(compare_with_parent(parent.log_probs, head, ids, parent.hidden, final), parent.loss)
