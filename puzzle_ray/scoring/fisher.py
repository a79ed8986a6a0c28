"""Damage estimated from gradients, without running the layers behind a replaced block. A shortlist is chosen by these estimates.

Let a replacement change its block's output by d_t at token t. Draw a label y_u from the parent's own distribution at every position u,
and let g_t be the gradient of sum_u log p(y_u | x) at the block's output at token t. To second order, KL(parent || changed model)
summed over positions is 1/2 d' F d, with the Fisher matrix F = E[g g'] (Martens, "New insights and perspectives on the natural
gradient method", 2020, section 9). The labels must be drawn: gradients of the data's own labels give another matrix. The gradients
of independent labels have mean zero, so

    KL per token  ~  1/(2T) E[(sum_t g_t . d_t)^2]  =  1/(2T) (sum_t E[(g_t . d_t)^2]  +  sum_{t != u} E[(g_t . d_t)(g_u . d_u)])

The estimate is the first sum: the mean over tokens of (g_t . d_t)^2 / 2. It is unbiased for that sum. It leaves out the products of
different positions, which are small: a few percent on a trained 8-layer Llama. To estimate the whole square instead would take many
more backward passes, because a sequence of T tokens is then one sample and not T samples. A pair of variants changes the outputs of
both halves, by d and e. With the gradients g and h there, its terms are (g_t . d_t + h_t . e_t)^2 / 2.

Gradients go back layer by layer from the parent's remembered inputs. So a model that is cut into shards gives the same bits as a
whole one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from puzzle_ray.artifacts import KINDS, PARENT, LayerChoice, LayerSpace, SearchSpace, SubblockKind
from puzzle_ray.errors import ConfigError
from puzzle_ray.models.blocks import LayerStack, swapped
from puzzle_ray.process import give_back_freed_memory
from puzzle_ray.scoring.replacements import Replacement, all_replacements
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.store import Artifact

if TYPE_CHECKING:
    from puzzle_ray.scoring.shard import ShardScorer, StatesOf

_FOLDER = "fisher"  # one file per task: some text batches, whose gradients are in memory together

Gradients = list[list[Tensor]]  # per batch, per sample: [batch, tokens, hidden_size]
Estimates = dict[str, list[float]]  # key of a replacement -> one estimate per sequence, in nats per token


def estimate_key(replacement: Replacement) -> str:
    return f"{replacement.layer}/{replacement.choice.attention}/{replacement.choice.ffn}"


def shard_estimates(
    scorer: ShardScorer,
    batches: Sequence[int],
    gradients: Gradients | None,
    space: SearchSpace,
    config: ScoringConfig,
    states_of: StatesOf,
) -> tuple[Estimates, Gradients]:
    """Estimates for the replacements of a shard's layers on some text batches, and the gradients at the shard's input.

    `gradients` are the gradients at the shard's output. For the last shard they are None: it draws the labels and computes them.
    """
    stack = scorer.stack
    if gradients is None:
        gradients = [_label_gradients(scorer, number, config.fisher_samples) for number in batches]
        give_back_freed_memory()
    estimates: Estimates = {}
    for index in reversed(range(stack.first, stack.last)):
        choices = [r.choice for r in all_replacements(SearchSpace((space.layers[index],)), config.granularity)]
        halves = _LayerHalves.of(stack, index, space.layers[index], states_of)
        by_choice: dict[LayerChoice, list[float]] = {choice: [] for choice in choices}
        gradients_before = []
        for number, leaving in zip(batches, gradients, strict=True):
            products, before = halves.products(scorer.inputs[number][index], leaving, scorer.position_ids(number))
            gradients_before.append(before)
            for choice, values in by_choice.items():
                own = [products[kind, choice.variant(kind)] for kind in KINDS if choice.variant(kind) != PARENT]
                change = own[0] if len(own) == 1 else own[0] + own[1]
                values += (change.square().mean((0, 2)) / 2).tolist()
        gradients = gradients_before
        estimates |= {estimate_key(Replacement(index, choice)): values for choice, values in by_choice.items()}
    return estimates, gradients


def _label_gradients(scorer: ShardScorer, number: int, samples: int) -> list[Tensor]:
    """For every sample, the gradient of the summed log-probability of drawn labels at what leaves the last layer."""
    log_probs = scorer.parent[number].log_probs
    assert log_probs is not None
    probs = log_probs.exp().flatten(0, 1)
    labels = torch.multinomial(probs, samples, replacement=True, generator=torch.Generator(probs.device).manual_seed(number))
    return gradients_of_labels(scorer.stack, scorer.inputs[number][scorer.stack.last], probs, labels)


def gradients_of_labels(stack: LayerStack, leaving: Tensor, probs: Tensor, labels: Tensor) -> list[Tensor]:
    """The gradients at `leaving`, what leaves the last layer, of the summed log-probability of each column of `labels`.

    `leaving` is `[batch, tokens, hidden_size]`, `probs` `[batch * tokens, vocab_size]`, `labels` `[batch * tokens, samples]`.
    """
    assert isinstance(stack.head, nn.Linear) and stack.final_norm is not None
    weight = stack.head.weight
    hidden = leaving.detach().requires_grad_()
    with torch.enable_grad():
        final = stack.final_norm(hidden)
    with torch.no_grad():
        slopes = stack.logit_slopes(leaving)
    slopes = None if slopes is None else slopes.flatten(0, 1)
    moved = probs if slopes is None else probs * slopes
    expected = moved.to(weight.dtype) @ weight  # the gradient at the head's input is the label's row minus this
    found = []
    for sample in range(labels.shape[1]):
        rows = weight[labels[:, sample]]
        if slopes is not None:
            rows = rows * slopes.gather(1, labels[:, sample : sample + 1]).to(weight.dtype)
        upstream = (rows - expected).view_as(final)
        found.append(torch.autograd.grad(final, hidden, upstream, retain_graph=sample + 1 < labels.shape[1])[0])
    return found


@dataclass(frozen=True)
class _LayerHalves:
    """The two halves of one parent layer, and every variant of each as a half of its own."""

    stack: LayerStack
    index: int
    parents: Mapping[SubblockKind, nn.Module]
    variants: Mapping[tuple[SubblockKind, str], nn.Module]

    @classmethod
    def of(cls, stack: LayerStack, index: int, space: LayerSpace, states_of: StatesOf) -> _LayerHalves:
        if space.coupled:
            raise ConfigError("scoring.shortlist", "coupled pairs have no halves to estimate", "write scoring.shortlist: none")
        layer, descriptor, config = stack.layer(index), stack.descriptor, stack.config
        parents = {kind: swapped(layer, LayerChoice.half(kind, PARENT), descriptor, config) for kind in KINDS}
        variants = {
            (kind, name): swapped(
                layer, LayerChoice.half(kind, name), descriptor, config, states_of(index, LayerChoice(**{kind: name}))
            )
            for kind in KINDS
            for name in space.variants(kind)
            if name != PARENT
        }
        return cls(stack, index, parents, variants)

    def products(
        self, x: Tensor, leaving: Sequence[Tensor], position_ids: Tensor | None
    ) -> tuple[dict[tuple[SubblockKind, str], Tensor], list[Tensor]]:
        """For every variant the product gradient . change, `[samples, batch, tokens]`, and the gradients at the layer's input.

        `x` is the layer's input, `[batch, tokens, hidden_size]`; `leaving` has the gradients at its output, one per sample. `position_ids`
        say where its documents begin.
        """
        run, index = self.stack.run_layer, self.index
        arguments = self.stack.layer_arguments(x, index, position_ids)
        with torch.enable_grad():
            start = x.detach().requires_grad_()
            middle = run(self.parents["attention"], index, start, arguments)
            end = run(self.parents["ffn"], index, middle, arguments)
        at_middle, entering = [], []
        for sample, gradient in enumerate(leaving):
            pair = torch.autograd.grad(end, (middle, start), gradient, retain_graph=sample + 1 < len(leaving))
            at_middle.append(pair[0])
            entering.append(pair[1])
        ends: dict[SubblockKind, tuple[Tensor, Tensor, Sequence[Tensor]]] = {
            "attention": (x, middle.detach(), at_middle),
            "ffn": (middle.detach(), end.detach(), leaving),
        }
        products = {}
        with torch.no_grad():
            for (kind, name), module in self.variants.items():
                source, parent, gradients = ends[kind]
                change = run(module, index, source, arguments) - parent
                products[kind, name] = torch.stack([(gradient.float() * change.float()).sum(-1) for gradient in gradients])
        return products, entering


def unestimated_batches(num_texts: int, artifact: Artifact) -> list[int]:
    """The text batches that no file has estimates of."""
    done = {batch for name in artifact.names(_FOLDER) for batch in artifact.read_json(f"{_FOLDER}/{name}")["batches"]}
    return [batch for batch in range(num_texts) if batch not in done]


def save_estimates(artifact: Artifact, batches: Sequence[int], of_shards: Sequence[Estimates]) -> None:
    """Writes the estimates on some batches, joined over the shards."""
    joined = {key: values for estimates in of_shards for key, values in estimates.items()}
    artifact.write_json(f"{_FOLDER}/batches_{batches[0]:05d}.json", {"batches": list(batches), "estimates": joined})


def load_estimates(sequences: Sequence[int], artifact: Artifact) -> Estimates:
    """The estimates on all batches, in order. Batch n has `sequences[n]` sequences."""
    by_batch: dict[int, Estimates] = {}
    for name in artifact.names(_FOLDER):
        found = artifact.read_json(f"{_FOLDER}/{name}")
        start = 0
        for batch in found["batches"]:
            end = start + sequences[batch]
            by_batch[batch] = {key: values[start:end] for key, values in found["estimates"].items()}
            start = end
    joined: Estimates = {}
    for _, estimates in sorted(by_batch.items()):
        for key, values in estimates.items():
            joined.setdefault(key, []).extend(values)
    return joined
