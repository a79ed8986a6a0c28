"""`linear`: one matrix in place of the subblock, behind its norm, with a bias if the parent's output projection has one.

(Paper v5, section 2.) It is initialised by the product of the parent's matrices (V then O; up then down) or by least squares on
calibration activations. Least squares are fitted on one half of the calibration tokens, and both are compared on the other half, where
their damping is chosen, too. If least squares are better, they are fitted again on all tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from puzzle_ray.artifacts import KINDS, SubblockKind
from puzzle_ray.calibration import INPUTS, Statistics, largest_damping
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.surgery.projections import AttentionProjections, FFNProjections, Projection, copy_checked
from puzzle_ray.surgery.shapes import ATTENTION, FFN, HEADS, LINEAR, linear_attention, linear_ffn
from puzzle_ray.variants.base import refuse_argument


def _product(last: Projection, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """The matrix of a linear map followed by `last`, in float64, with the bias as one more column if `last` has one."""
    outer = last.weight_OI.double()
    product = outer @ weight_OI.double()
    if last.bias_O is None:
        return product
    bias = last.bias_O.double() + (0 if bias_O is None else outer @ bias_O.double())
    return torch.cat([product, bias[:, None]], dim=1)


def _product_start(parent: nn.Module, kind: SubblockKind, descriptor: Descriptor) -> Tensor:
    if kind == "ffn":
        ffn = FFNProjections.of(parent, descriptor)
        return _product(ffn.down, ffn.up.weight_OI, ffn.up.bias_O)
    # If every token attends to itself alone, attention computes O . V.
    attention = AttentionProjections.of(parent, descriptor)
    values = attention.values_by_query_head
    return _product(attention.output, values.weight_OI, values.bias_O)


class Linear:
    name = "linear"
    kinds = KINDS
    trainable = True
    needs: tuple[str, ...] = (INPUTS,)

    def resolve(self, argument: str, kind: SubblockKind, config: Any, multiple_of: int) -> str | None:
        refuse_argument(self.name, argument, kind)
        return ""

    def reshape(self, layer: nn.Module, argument: str, kind: SubblockKind, descriptor: Descriptor, config: Any) -> None:
        if kind == "attention":
            linear_attention(layer, descriptor)
        else:
            linear_ffn(layer, descriptor, config.hidden_size)

    def words(self, argument: str, kind: SubblockKind, descriptor: Descriptor) -> dict[str, Any]:
        return {LINEAR: [ATTENTION], HEADS: 1} if kind == "attention" else {LINEAR: [FFN]}

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
        parameters = list(layer.get_submodule(descriptor.module(kind)).parameters())
        has_bias = len(parameters) > 1
        product, (seen, unseen) = _product_start(parent, kind, descriptor), statistics.halves[kind]
        damping, error = largest_damping(lambda d: unseen.relative_error(seen.least_squares(has_bias, d)))
        errors = {"product": unseen.relative_error(product), "least squares": error}
        best = min(errors, key=lambda name: errors[name])
        start = product if best == "product" else statistics.moments[kind].least_squares(has_bias, damping)
        copy_checked(parameters[0], start[:, : parameters[0].shape[1]])
        if has_bias:
            copy_checked(parameters[1], start[:, -1])
        other = next(name for name in errors if name != best)
        damped = "" if best == "product" else f", damping {damping:g}"
        return f"{best} (relative error {errors[best]:.3f}{damped}; {other} {errors[other]:.3f})"


VARIANT = Linear()
