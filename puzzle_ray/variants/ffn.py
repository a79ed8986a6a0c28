"""`ffn:N`: the N FFN channels that contribute most, by mean |X_i| * ||W_down[:, i]|| (paper, section 3.2)."""

from __future__ import annotations

from typing import Any

from torch import nn

from puzzle_ray.artifacts import SubblockKind
from puzzle_ray.families import Descriptor
from puzzle_ray.modules import copy_, resize_linear
from puzzle_ray.variants import fraction_or_count
from puzzle_ray.variants._statistics import Statistics


class NarrowFFN:
    name = "ffn"
    kinds: tuple[SubblockKind, ...] = ("ffn",)
    trainable = True

    def resolve(self, argument: str, kind: SubblockKind, config: Any, multiple_of: int) -> str | None:
        whole = int(config.intermediate_size)
        width = fraction_or_count(argument, whole, "space.ffn")
        if argument.endswith("%"):
            width = max(multiple_of, round(width / multiple_of) * multiple_of)
        return None if width >= whole else str(int(width))

    def reshape(self, layer: nn.Module, argument: str, kind: SubblockKind, descriptor: Descriptor, config: Any) -> None:
        ffn = getattr(layer, descriptor.ffn)
        width = int(argument)
        for name in (descriptor.ffn_gate, descriptor.ffn_up):
            linear = getattr(ffn, name)
            setattr(ffn, name, resize_linear(linear, linear.in_features, width))
        down = getattr(ffn, descriptor.ffn_down)
        setattr(ffn, descriptor.ffn_down, resize_linear(down, width, down.out_features))
        ffn.intermediate_size = width

    def initialise(
        self,
        layer: nn.Module,
        parent: nn.Module,
        argument: str,
        kind: SubblockKind,
        descriptor: Descriptor,
        statistics: Statistics,
    ) -> str:
        old, new = getattr(parent, descriptor.ffn), getattr(layer, descriptor.ffn)
        old_down = getattr(old, descriptor.ffn_down)
        contribution_F = statistics.channel_mean_F * old_down.weight.double().norm(dim=0)
        kept = contribution_F.topk(int(argument)).indices.sort().values
        for name in (descriptor.ffn_gate, descriptor.ffn_up):
            source, target = getattr(old, name), getattr(new, name)
            copy_(target.weight, source.weight[kept])
            if source.bias is not None:
                copy_(target.bias, source.bias[kept])
        new_down = getattr(new, descriptor.ffn_down)
        copy_(new_down.weight, old_down.weight[:, kept])
        if old_down.bias is not None:
            copy_(new_down.bias, old_down.bias)
        return "channel contribution"


VARIANT = NarrowFFN()
