"""`gqa:N`: attention with N key-value heads, each the mean of the parent's heads it stands for (Ainslie et al. 2023)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from puzzle_ray.artifacts import SubblockKind
from puzzle_ray.errors import ConfigError
from puzzle_ray.families import Descriptor
from puzzle_ray.modules import copy_, resize_linear
from puzzle_ray.variants import fraction_or_count
from puzzle_ray.variants._statistics import Statistics


class GroupedQueryAttention:
    name = "gqa"
    kinds: tuple[SubblockKind, ...] = ("attention",)
    trainable = True

    def resolve(self, argument: str, kind: SubblockKind, config: Any, multiple_of: int) -> str | None:
        whole = int(config.num_key_value_heads)
        heads = max(1, round(fraction_or_count(argument, whole, "space.attention")))
        if whole % heads:
            divisors = ", ".join(str(n) for n in range(1, whole) if whole % n == 0)
            raise ConfigError(
                "space.attention", f"gqa:{argument}: {heads} does not divide {whole} KV heads", f"use one of {divisors}"
            )
        return None if heads == whole else str(heads)

    def reshape(self, layer: nn.Module, argument: str, kind: SubblockKind, descriptor: Descriptor, config: Any) -> None:
        attention = getattr(layer, descriptor.attention)
        heads = int(argument)
        for name in (descriptor.key, descriptor.value):
            linear = getattr(attention, name)
            setattr(attention, name, resize_linear(linear, linear.in_features, heads * attention.head_dim))
        attention.num_key_value_groups = config.num_attention_heads // heads

    def initialise(
        self,
        layer: nn.Module,
        parent: nn.Module,
        argument: str,
        kind: SubblockKind,
        descriptor: Descriptor,
        statistics: Statistics,
    ) -> str:
        old, new = getattr(parent, descriptor.attention), getattr(layer, descriptor.attention)
        heads = int(argument)

        def pooled(rows: Tensor) -> Tensor:
            """[KV heads * head_dim, ...] -> [heads * head_dim, ...], mean over the heads of a group."""
            split = rows.unflatten(0, (heads, -1, old.head_dim))
            return split.mean(dim=1).flatten(0, 1)

        for name in (descriptor.key, descriptor.value):
            source, target = getattr(old, name), getattr(new, name)
            copy_(target.weight, pooled(source.weight))
            if source.bias is not None:
                copy_(target.bias, pooled(source.bias))
        return "mean-pooled heads"


VARIANT = GroupedQueryAttention()
