"""What a whole child minimises: KL and next-token loss of its predictions, and the cosine distance of its layers' outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from puzzle_ray.distill.chosen_tokens import Markers, in_answers
from puzzle_ray.distill.head_losses import head_losses, label_log_probs, layers_cosine_distance, layers_cosine_distances
from puzzle_ray.distill.layer_weights import layer_weights
from puzzle_ray.distill.losses import NO_LABEL, next_labels
from puzzle_ray.distill.settings import AUTO, GkdConfig
from puzzle_ray.models.describe import describe
from puzzle_ray.models.head import Head, final_states

Terms = tuple[Tensor, Tensor, Tensor, Tensor]
States = Callable[[Any, Tensor], Tensor]  # the output of a model's final norm for some ids, as of `final_states`


@contextmanager
def layer_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the output of every layer while the context is open: `[batch, tokens, hidden_size]`, before the final norm."""
    outputs: list[Tensor] = []

    def collect(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    layers = model.get_submodule(describe(model.config).layers)
    hooks = [layer.register_forward_hook(collect) for layer in layers.children()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def computes_in_half(config: GkdConfig, device: torch.device, parent_dtype: torch.dtype) -> bool:
    """Whether the child computes in bfloat16; its weights are float32."""
    if config.compute_dtype == AUTO:
        return device.type != "cpu" and parent_dtype != torch.float32
    return config.compute_dtype == "bfloat16"


class ChildLoss:
    """The loss of one child as its settings weigh it. `markers` are the ids of `gkd.lm_tokens.after` and `until`.

    Raises ConfigError where the settings do not suit the child.
    """

    def __init__(self, config: GkdConfig, child_config: Any, markers: Markers | None = None) -> None:
        self.config, self.markers = config, markers
        self.layer_weights = layer_weights(config, child_config)
        if config.lm_tokens is not None and config.lm_tokens.after and markers is None:
            raise ValueError("gkd.lm_tokens.after needs the ids of its markers; see answer_markers")

    def terms(self, child: Any, parent: Any, input_ids: Tensor, states: States = final_states) -> Terms:
        """(weighted sum, KL, cosine distance, next-token loss) of ids `[batch, tokens]`. A term of weight 0 gives no gradient.

        `states` runs a model; afterwards the weights of its head must be at hand.
        """
        config, device = self.config, input_ids.device
        half = computes_in_half(config, device, parent.dtype)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            with torch.no_grad(), layer_outputs(parent) as parent_hidden:
                parent_final = states(parent, input_ids)
            with layer_outputs(child) as child_hidden:
                child_final = states(child, input_ids)
            labels = self._labels(input_ids, Head.of(parent), parent_final)
            weights = (config.kl_weight, config.lm_weight, config.temperature)
            total, kl, lm = head_losses(Head.of(child), child_final, Head.of(parent), parent_final, labels, *weights)
        with torch.set_grad_enabled(config.cosine_weight > 0):
            cosine = self._cosine(child_hidden, parent_hidden)
        return total + config.cosine_weight * cosine, kl, cosine, lm

    def _cosine(self, child_hidden: Sequence[Tensor], parent_hidden: Sequence[Tensor]) -> Tensor:
        equal = len(set(self.layer_weights)) == 1
        if equal and self.config.cosine_reduction == "mean":
            return layers_cosine_distance(child_hidden, parent_hidden)
        distances = layers_cosine_distances(child_hidden, parent_hidden)
        total = (distances * torch.tensor(self.layer_weights, device=distances.device)).sum()
        return total if self.config.cosine_reduction == "sum" else total / math.fsum(self.layer_weights)

    def _labels(self, input_ids: Tensor, parent: Head, parent_final: Tensor) -> Tensor:
        """The tokens that the next-token loss counts; NO_LABEL elsewhere."""
        labels, rule = next_labels(input_ids), self.config.lm_tokens
        if rule is None:
            return labels
        chosen = torch.ones_like(labels, dtype=torch.bool)
        if self.markers is not None:
            chosen[:, :-1] &= in_answers(input_ids, *self.markers)[:, 1:]
        if rule.min_parent_probability:
            chosen &= label_log_probs(parent, parent_final, labels) >= math.log(rule.min_parent_probability)
        return labels.masked_fill(~chosen, NO_LABEL)
