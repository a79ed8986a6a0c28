"""`linear`: one matrix in place of the subblock, behind its norm (paper, section 2).

It starts from the product of the parent's matrices (V then O; up then down) or from least squares on calibration activations,
whichever predicts those activations better.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from puzzle_ray.artifacts import KINDS, SubblockKind
from puzzle_ray.families import Descriptor
from puzzle_ray.modules import LinearAttention, LinearFFN, copy_
from puzzle_ray.variants._statistics import Statistics


def _value_output_product(attention: nn.Module, descriptor: Descriptor) -> Tensor:
    """What attention does when every token sees itself alone: O . V, `[hidden_size, hidden_size]`."""
    value: Tensor = getattr(attention, descriptor.value).weight
    output: Tensor = getattr(attention, descriptor.output).weight
    heads = value.unflatten(0, (-1, attention.head_dim))
    repeated = heads.repeat_interleave(attention.num_key_value_groups, dim=0).flatten(0, 1)
    return output.double() @ repeated.double()


class Linear:
    name = "linear"
    kinds = KINDS
    trainable = True

    def resolve(self, argument: str, kind: SubblockKind, config: Any, multiple_of: int) -> str | None:
        return ""

    def reshape(self, layer: nn.Module, argument: str, kind: SubblockKind, descriptor: Descriptor, config: Any) -> None:
        old = getattr(layer, descriptor.module(kind))
        attention = kind == "attention"
        new: nn.Module = LinearAttention(config.hidden_size, old.layer_idx) if attention else LinearFFN(config.hidden_size)
        like = next(old.parameters())
        setattr(layer, descriptor.module(kind), new.to(dtype=like.dtype, device=like.device))

    @torch.no_grad()
    def initialise(
        self,
        layer: nn.Module,
        parent: nn.Module,
        argument: str,
        kind: SubblockKind,
        descriptor: Descriptor,
        statistics: Statistics,
    ) -> str:
        old = getattr(parent, descriptor.module(kind))
        if kind == "attention":
            product = _value_output_product(old, descriptor)
        else:
            product = getattr(old, descriptor.ffn_down).weight.double() @ getattr(old, descriptor.ffn_up).weight.double()
        moments = statistics.moments[kind]
        starts = {"product": product, "least squares": moments.least_squares()}
        errors = {name: moments.relative_error(weight) for name, weight in starts.items()}
        best = min(errors, key=lambda name: errors[name])
        copy_(next(getattr(layer, descriptor.module(kind)).parameters()), starts[best])
        return f"{best} (relative error {errors[best]:.3f}; product {errors['product']:.3f})"


VARIANT = Linear()
