"""How well-conditioned a variant is: the norms of its matrices beside the parent's, and how much it magnifies noise in its input.

A variant may copy its parent block well and still have huge entries that cancel. Then the smallest change in front of it, as global
distillation makes, ruins its output. Both figures are cheap: they cost one short forward of one sequence, once a variant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from puzzle_ray.artifacts import SubblockKind
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.surgery.projections import AttentionProjections, FFNProjections

CHANGE = 1e-3  # of the input, relative to the norm of every token
_ITERATIONS, _TOLERANCE = 64, 1e-4


def largest_singular_value(factors: Sequence[Tensor]) -> float:
    """Of the product of matrices `[out, in]`, by power iteration, in float32. It is from below, and right to about a percent."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(factors[-1].shape[1], generator=generator).to(factors[0].device)
    value = 0.0
    for _ in range(_ITERATIONS):
        v = v / v.norm().clamp_min(1e-30)
        for factor in reversed(factors):
            v = factor.float() @ v
        before, value = value, float(v.norm())
        for factor in factors:
            v = factor.float().T @ v
        if abs(value - before) <= _TOLERANCE * value:
            break
    return value if math.isfinite(value) else math.inf


def own_product(layer: nn.Module, kind: SubblockKind, descriptor: Descriptor) -> tuple[Tensor, Tensor]:
    """The matrices whose product is a subblock without what is between them: O and V, or down and up."""
    if kind == "ffn":
        ffn = FFNProjections.of(layer, descriptor)
        return ffn.down.weight_OI, ffn.up.weight_OI
    attention = AttentionProjections.of(layer, descriptor)
    return attention.output.weight_OI, attention.values_by_query_head.weight_OI


class ParentNorms:
    """Largest singular values of one parent layer's matrices, computed once."""

    def __init__(self, layer: nn.Module, descriptor: Descriptor) -> None:
        self.layer, self.descriptor = layer, descriptor
        self.matrices = {name: p.detach() for name, p in layer.named_parameters() if p.ndim == 2}
        self.found: dict[str, float] = {}

    def of(self, name: str, kind: SubblockKind) -> float:
        """Of the matrix of this name; where the parent has none, of the product of its own (see `own_product`)."""
        key = name if name in self.matrices else kind
        if key not in self.found:
            factors = [self.matrices[name]] if key == name else own_product(self.layer, kind, self.descriptor)
            self.found[key] = largest_singular_value(factors)
        return self.found[key]


def norms(halves: Mapping[SubblockKind, nn.Module], parent: ParentNorms) -> tuple[float, float]:
    """(largest singular value, the parent's) of the matrix of a variant that is furthest above the parent's. (0, 0) without matrices."""
    pairs = []
    for kind, half in halves.items():
        own = parent.descriptor.prefixes(kind)
        for name, parameter in half.named_parameters():
            if parameter.ndim == 2 and name.startswith(own):
                pairs.append((largest_singular_value([parameter.detach()]), parent.of(name, kind)))
    return max(pairs, key=lambda pair: pair[0] / max(pair[1], 1e-30), default=(0.0, 0.0))


def changed_inputs(x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The input plus and minus a random change of `CHANGE` times the norm of every token. It is a function of the seed."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
    noise = CHANGE * noise * (x.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
    return x + noise, x - noise


def sensitivity(outputs: Sequence[Tensor], target: Tensor) -> float:
    """The rise of a block's loss under a random change of its input.

    `outputs` are the block's for the input itself and for the two of `changed_inputs`; `target` is the parent's output for the input.
    The loss is the normalised MSE. It is a mean over both signs of the change, so that what falls with one of them cancels.
    """
    square = target.double().square().sum().clamp_min(1e-30)
    still, *moved = (float((out.double() - target.double()).square().sum() / square) for out in outputs)
    rise = sum(moved) / len(moved) - still
    return rise if math.isfinite(rise) else math.inf
