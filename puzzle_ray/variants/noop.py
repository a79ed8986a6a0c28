"""`noop`: the subblock and its norms are removed, and only the residual stream is left. (Paper v5, section 2.)"""

from __future__ import annotations

from typing import Any

from torch import nn

from puzzle_ray.artifacts import KINDS, SubblockKind
from puzzle_ray.calibration import Statistics
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.surgery.shapes import ATTENTION, FFN, HEADS, SKIP, remove_attention, remove_ffn
from puzzle_ray.variants.base import refuse_argument


class Noop:
    name = "noop"
    kinds = KINDS
    trainable = False
    needs: tuple[str, ...] = ()

    def resolve(self, argument: str, kind: SubblockKind, config: Any, multiple_of: int) -> str | None:
        refuse_argument(self.name, argument, kind)
        return ""

    def reshape(self, layer: nn.Module, argument: str, kind: SubblockKind, descriptor: Descriptor, config: Any) -> None:
        if kind == "attention":
            remove_attention(layer, descriptor)
        else:
            remove_ffn(layer, descriptor)

    def words(self, argument: str, kind: SubblockKind, descriptor: Descriptor) -> dict[str, Any]:
        # one KV head, of a cache that stays empty: vLLM sizes one for every layer
        return {SKIP: [ATTENTION], HEADS: 1} if kind == "attention" else {SKIP: [FFN]}

    def initialise(
        self,
        layer: nn.Module,
        parent: nn.Module,
        argument: str,
        kind: SubblockKind,
        descriptor: Descriptor,
        statistics: Statistics,
    ) -> str:
        return "nothing to fill"


VARIANT = Noop()
