"""Replace-one scores (paper, section 3.3): one layer is exchanged, the others stay the parent's, and the damage is measured.

Only layers from the exchanged one on run again: what comes before is the parent's and is kept. The result is bitwise that of the
whole forward. Work is cut at shard borders, so that a model spread over processes is scored the same way as one in a single process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from puzzle_ray.artifacts import LayerChoice, ScoreRow, Scores, SearchSpace, SubblockKind
from puzzle_ray.blocks import LayerStack, swapped
from puzzle_ray.config import ScoringConfig
from puzzle_ray.progress import Progress
from puzzle_ray.scoring.metrics import PredictionMetrics, compare, mean, standard_error
from puzzle_ray.store import Step

States = Mapping[SubblockKind, Mapping[str, Tensor]]
TABLE = "scores.parquet"


@dataclass(frozen=True)
class Item:
    """One exchange to score."""

    layer: int
    choice: LayerChoice

    @property
    def name(self) -> str:
        words = f"{self.choice.attention}+{self.choice.ffn}"
        return f"items/layer_{self.layer:03d}.{''.join(c if c.isalnum() or c in '+._' else '-' for c in words)}.json"


def plan(space: SearchSpace, granularity: str) -> list[Item]:
    """`block`: every pair of variants; `subblock`: each variant beside the parent's other half."""
    items = []
    for index, layer in enumerate(space.layers):
        for choice in layer.choices:
            one_half = "parent" in (choice.attention, choice.ffn)
            if choice != LayerChoice() and (granularity == "block" or one_half):
                items.append(Item(index, choice))
    return items


class ShardScorer:
    """A shard's part in scoring. Inputs and outputs are one tensor per evaluation batch, `[batch, tokens, hidden_size]`."""

    def __init__(self, stack: LayerStack, input_ids: Sequence[Tensor]) -> None:
        self.stack, self.input_ids = stack, list(input_ids)
        self.inputs: list[dict[int, Tensor]] = []  # per batch: layer -> the parent's input
        self.parent_log_probs: list[Tensor] = []
        self.ends = stack.head is not None

    @torch.no_grad()
    def run_parent(self, entering: Sequence[Tensor]) -> list[Tensor]:
        """Remembers the parent's activations of these layers; returns what leaves the shard. The first shard takes token ids."""
        self.inputs, self.parent_log_probs = [], []
        leaving = []
        for hidden_states in entering:
            hidden = self.stack.embed(hidden_states) if self.stack.embedding is not None else hidden_states
            kept = {}
            for index in range(self.stack.first, self.stack.last):
                kept[index] = hidden
                hidden = self.stack.run_layer(self.stack.layer(index), index, hidden)
            self.inputs.append(kept)
            leaving.append(hidden)
            if self.ends:
                self.parent_log_probs.append(F.log_softmax(self.stack.logits(hidden).float(), dim=-1))
        return leaving

    @torch.no_grad()
    def exchange(self, item: Item, states: States) -> list[Tensor]:
        """The exchanged layer on the parent's input to it, then the rest of this shard."""
        stack = self.stack
        layer = swapped(stack.layer(item.layer), item.choice, stack.descriptor, stack.config, states)
        started = [stack.run_layer(layer, item.layer, kept[item.layer]) for kept in self.inputs]
        return self._run_rest(started, item.layer + 1)

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
    def measure(self, leaving: Sequence[Tensor]) -> PredictionMetrics:
        """What the last shard says of final hidden states."""
        batches = zip(leaving, self.parent_log_probs, self.input_ids, strict=True)
        return PredictionMetrics.joined([compare(parent, self.stack.logits(h), ids) for h, parent, ids in batches])

    def parent_loss(self) -> tuple[float, ...]:
        """The parent's own next-token loss per sequence."""
        pairs = zip(self.parent_log_probs, self.input_ids, strict=True)
        return PredictionMetrics.joined([compare(lp, lp, ids) for lp, ids in pairs]).lm_loss


def rows_of(item: Item, metrics: PredictionMetrics, parent_loss: tuple[float, ...]) -> list[ScoreRow]:
    """Every metric as a difference from the parent: 0 is no damage."""
    differences = {
        "kl": metrics.kl,
        "lm_loss": tuple(c - p for c, p in zip(metrics.lm_loss, parent_loss, strict=True)),
        "top1_disagreement": tuple(1.0 - a for a in metrics.top1_agreement),
    }
    choice = item.choice
    return [
        ScoreRow(item.layer, choice.attention, choice.ffn, metric, mean(values), standard_error(values), metrics.tokens)
        for metric, values in differences.items()
    ]


def unfinished(items: Sequence[Item], step: Step) -> list[Item]:
    there = set(step.names("items"))
    return [item for item in items if item.name.removeprefix("items/") not in there]


def save_item(step: Step, item: Item, rows: Sequence[ScoreRow]) -> None:
    step.write_json(item.name, [asdict(row) for row in rows])


def merge(items: Sequence[Item], config: ScoringConfig, step: Step) -> Scores:
    """All item files as one table; closes the step."""
    rows = [ScoreRow(**row) for item in items for row in step.read_json(item.name)]
    scores = Scores(tuple(rows), config.granularity)
    step.write(TABLE, scores.to_parquet())
    worst = max((r for r in rows if r.metric == config.metric), key=lambda r: r.value, default=None)
    step.finish({"items": len(items), "worst": asdict(worst) if worst else None})
    return scores


def score_serially(
    stack: LayerStack,
    batches: Sequence[Tensor],
    space: SearchSpace,
    config: ScoringConfig,
    step: Step,
    states_of: Callable[[int, LayerChoice], States],
    progress: Progress,
) -> Scores:
    """The scoring stage in this process, without Ray. `stack` holds the whole parent."""
    items = plan(space, config.granularity)
    todo = unfinished(items, step)
    if todo:
        scorer = ShardScorer(stack, batches)
        scorer.run_parent(batches)
        parent_loss = scorer.parent_loss()
        with progress.stage("score", len(items), "block") as bar:
            bar.advance(len(items) - len(todo))
            for item in todo:
                metrics = scorer.measure(scorer.exchange(item, states_of(item.layer, item.choice)))
                save_item(step, item, rows_of(item, metrics, parent_loss))
                bar.advance()
    return merge(items, config, step)
