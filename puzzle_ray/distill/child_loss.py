"""What a whole child minimises: KL and next-token loss of its predictions, and the cosine distance of its layers' outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from puzzle_ray.distill.losses import (
    NO_LABEL,
    cosine_distance,
    cosine_distances,
    label_log_probs,
    next_labels,
    token_losses,
)
from puzzle_ray.distill.settings import GkdConfig, LmTokens
from puzzle_ray.errors import ConfigError
from puzzle_ray.models.describe import describe

Markers = tuple[tuple[int, ...], tuple[int, ...]]  # the ids around an answer
Terms = tuple[Tensor, Tensor, Tensor, Tensor]


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


class ChildLoss:
    """The loss of one child as its settings weigh it. `markers` are the ids of `gkd.lm_tokens.after` and `until`.

    Raises ConfigError where the settings do not suit the child.
    """

    def __init__(self, config: GkdConfig, child_config: Any, markers: Markers | None = None) -> None:
        self.config, self.markers = config, markers
        self.layer_weights = layer_weights(config, child_config)
        if config.lm_tokens is not None and config.lm_tokens.after and markers is None:
            raise ValueError("gkd.lm_tokens.after needs the ids of its markers; see answer_markers")

    def terms(self, child: Any, parent: Any, input_ids: Tensor) -> Terms:
        """(weighted sum, KL, cosine distance, next-token loss) of ids `[batch, tokens]`. A term of weight 0 gives no gradient."""
        config, device = self.config, input_ids.device
        half = device.type != "cpu" and parent.dtype != torch.float32
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            with torch.no_grad(), layer_outputs(parent) as parent_hidden:
                parent_logits = parent(input_ids, use_cache=False).logits
            with layer_outputs(child) as child_hidden:
                child_logits = child(input_ids, use_cache=False).logits
        labels = self._labels(input_ids, parent_logits)
        weights = (config.kl_weight, config.lm_weight, config.temperature)
        total, kl, lm = token_losses(child_logits, parent_logits, labels, *weights)
        with torch.set_grad_enabled(config.cosine_weight > 0):
            cosine = self._cosine(child_hidden, parent_hidden)
        return total + config.cosine_weight * cosine, kl, cosine, lm

    def _cosine(self, child_hidden: Sequence[Tensor], parent_hidden: Sequence[Tensor]) -> Tensor:
        equal = len(set(self.layer_weights)) == 1
        if equal and self.config.cosine_reduction == "mean":
            return cosine_distance(child_hidden, parent_hidden)
        distances = cosine_distances(child_hidden, parent_hidden)
        total = (distances * torch.tensor(self.layer_weights, device=distances.device)).sum()
        return total if self.config.cosine_reduction == "sum" else total / math.fsum(self.layer_weights)

    def _labels(self, input_ids: Tensor, parent_logits: Tensor) -> Tensor:
        """The tokens that the next-token loss counts; NO_LABEL elsewhere."""
        labels, rule = next_labels(input_ids), self.config.lm_tokens
        if rule is None:
            return labels
        chosen = torch.ones_like(labels, dtype=torch.bool)
        if self.markers is not None:
            chosen[:, :-1] &= in_answers(input_ids, *self.markers)[:, 1:]
        if rule.min_parent_probability:
            chosen &= label_log_probs(parent_logits, labels) >= math.log(rule.min_parent_probability)
        return labels.masked_fill(~chosen, NO_LABEL)


def layer_weights(config: GkdConfig, child_config: Any) -> tuple[float, ...]:
    """The weight of every layer in the cosine loss. Raises ConfigError where a list of weights is not as long as the model is deep."""
    layers, wanted = int(child_config.num_hidden_layers), config.cosine_layers
    if wanted == "all":
        return (1.0,) * layers
    if wanted == "kept":
        names = getattr(child_config, "puzzle_layers", None) or [{}] * layers
        kept = tuple(float({layer.get("attention"), layer.get("ffn")} != {"noop"}) for layer in names)
        return kept if any(kept) else (1.0,) * layers
    if len(wanted) != layers:
        raise ConfigError("gkd.cosine_layers", f"{len(wanted)} weights for {layers} layers", "give one weight per layer")
    return tuple(wanted)


def answer_markers(rule: LmTokens | None, tokenizer: Any) -> Markers | None:
    """The ids of the texts around an answer; None where answers are not asked for. Raises ConfigError where a text has no ids."""
    if rule is None or not rule.after or not rule.until:
        return None
    ids = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (rule.after, rule.until)]
    for name, text, own in (("after", rule.after, ids[0]), ("until", rule.until, ids[1])):
        if not own:
            raise ConfigError(f"gkd.lm_tokens.{name}", f"{text!r} has no tokens", "write the marker as it stands in the text")
    return ids[0], ids[1]


def read_markers(rule: LmTokens | None, folder: Path) -> Markers | None:
    """`answer_markers` by the tokenizer of a model's folder, which is not read where no answers are asked for."""
    from puzzle_ray.models.tokenizer import read_tokenizer

    return answer_markers(rule, read_tokenizer(folder)) if rule is not None and rule.after else None


def in_answers(input_ids: Tensor, after: Sequence[int], until: Sequence[int]) -> Tensor:
    """Which tokens stand in an answer, `[batch, tokens]`: behind a marker `after`, up to and with the next marker `until`."""
    begun, ended = _last_before(input_ids, after), _last_before(input_ids, until)
    return (begun >= 0) & (begun > ended)


def _last_before(input_ids: Tensor, marker: Sequence[int]) -> Tensor:
    """For every token, where the last marker that is complete before it ends; -1 where there is none yet."""
    batch, tokens = input_ids.shape
    ends = torch.ones(batch, tokens, dtype=torch.bool, device=input_ids.device)
    for back, wanted in enumerate(reversed(marker)):
        ends[:, back:] &= input_ids[:, : tokens - back] == wanted
        ends[:, :back] = False
    positions = torch.arange(tokens, device=input_ids.device).expand(batch, tokens)
    last = torch.where(ends, positions, -1).cummax(dim=1).values
    return torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
