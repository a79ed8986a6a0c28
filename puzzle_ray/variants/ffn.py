"""`ffn:N`: the N FFN channels with the highest channel contribution, mean |X_i| * ||W_down[:, i]||. (Paper v5, appendix A.)"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from puzzle_ray.artifacts import SubblockKind
from puzzle_ray.calibration import Statistics
from puzzle_ray.errors import ConfigError
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.families.registry import ffn_width
from puzzle_ray.surgery.projections import FFNProjections, resize_ffn
from puzzle_ray.variants.base import fraction_or_count


class NarrowFFN:
    name = "ffn"
    kinds: tuple[SubblockKind, ...] = ("ffn",)
    trainable = True
    needs: tuple[str, ...] = ()

    def resolve(self, argument: str, kind: SubblockKind, config: Any, multiple_of: int) -> str | None:
        """A percentage is rounded to a multiple of `multiple_of`. A plain width must be a multiple of it."""
        whole = ffn_width(config)
        width = fraction_or_count(argument, whole, "space.ffn")
        if argument.endswith("%"):
            width = max(multiple_of, round(width / multiple_of) * multiple_of)
        elif width % multiple_of and width != whole:
            below = int(width // multiple_of * multiple_of)
            near = " or ".join(f"{self.name}:{n}" for n in (below, below + multiple_of) if 0 < n <= whole)
            raise ConfigError(
                "space.ffn",
                f"{self.name}:{argument} is no multiple of ffn_multiple_of={multiple_of}",
                f"write {near or f'{self.name}:{whole}'}, or change space.ffn_multiple_of",
            )
        return None if width >= whole else str(int(width))

    def reshape(self, layer: nn.Module, argument: str, kind: SubblockKind, descriptor: Descriptor, config: Any) -> None:
        resize_ffn(layer, int(argument), descriptor)

    def words(self, argument: str, kind: SubblockKind, descriptor: Descriptor) -> dict[str, Any]:
        return {descriptor.ffn_width: int(argument)}

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
        old = FFNProjections.of(parent, descriptor)
        contribution_F = statistics.channel_mean_F * old.down.weight_OI.double().norm(dim=0)
        FFNProjections.of(layer, descriptor).copy_channels(old, contribution_F.topk(int(argument)).indices.sort().values)
        return "channel contribution"


VARIANT = NarrowFFN()
