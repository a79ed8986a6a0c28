"""`gqa:N`: attention with N key-value heads, each the mean of a group of the parent's heads (Ainslie et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from puzzle_ray.artifacts import SubblockKind
from puzzle_ray.calibration import Statistics
from puzzle_ray.errors import ConfigError
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.families.registry import num_kv_heads
from puzzle_ray.surgery.projections import AttentionProjections, copy_checked, resize_attention
from puzzle_ray.surgery.shapes import HEADS
from puzzle_ray.variants.base import fraction_or_count


class GroupedQueryAttention:
    name = "gqa"
    kinds: tuple[SubblockKind, ...] = ("attention",)
    trainable = True
    needs: tuple[str, ...] = ()

    def resolve(self, argument: str, kind: SubblockKind, config: Any, multiple_of: int) -> str | None:
        whole = num_kv_heads(config)
        wanted = fraction_or_count(argument, whole, "space.attention")
        fitting = [n for n in range(1, whole + 1) if whole % n == 0]
        heads = min(fitting, key=lambda n: abs(n - wanted)) if argument.endswith("%") else max(1, round(wanted))
        if whole % heads:
            divisors = ", ".join(map(str, fitting[:-1]))
            raise ConfigError(
                "space.attention", f"{self.name}:{argument}: {heads} does not divide {whole} KV heads", f"use one of {divisors}"
            )
        return None if heads == whole else str(heads)

    def reshape(self, layer: nn.Module, argument: str, kind: SubblockKind, descriptor: Descriptor, config: Any) -> None:
        resize_attention(layer, int(argument), descriptor)

    def words(self, argument: str, kind: SubblockKind, descriptor: Descriptor) -> dict[str, Any]:
        return {HEADS: int(argument)}

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
        old, new = AttentionProjections.of(parent, descriptor), AttentionProjections.of(layer, descriptor)
        heads = int(argument)

        def pooled(rows: Tensor) -> Tensor:
            """`[num_key_value_heads * head_dim, ...]` -> `[heads * head_dim, ...]`, the mean over the heads of a group."""
            return rows.unflatten(0, (heads, -1, old.head_dim)).mean(dim=1).flatten(0, 1)

        new.query.write(old.query.weight_OI, old.query.bias_O)
        for source, target in ((old.key, new.key), (old.value, new.value)):
            target.write(pooled(source.weight_OI), None if source.bias_O is None else pooled(source.bias_O))
        for name in descriptor.key_norms:
            norms = [getattr(descriptor.core(x, "attention"), name) for x in (parent, layer)]
            copy_checked(norms[1].weight, pooled(norms[0].weight))
        return "mean-pooled heads"


VARIANT = GroupedQueryAttention()
