"""`parent`: the parent's own subblock, unchanged."""

from __future__ import annotations

from typing import Any

from torch import nn

from puzzle_ray.artifacts import KINDS, SubblockKind
from puzzle_ray.calibration import Statistics
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.variants.base import refuse_argument


class Parent:
    name = "parent"
    kinds = KINDS
    trainable = False
    needs: tuple[str, ...] = ()

    def resolve(self, argument: str, kind: SubblockKind, config: Any, multiple_of: int) -> str | None:
        refuse_argument(self.name, argument, kind)
        return None

    def reshape(self, layer: nn.Module, argument: str, kind: SubblockKind, descriptor: Descriptor, config: Any) -> None:
        return None

    def words(self, argument: str, kind: SubblockKind, descriptor: Descriptor) -> dict[str, Any]:
        return {}

    def initialise(
        self,
        layer: nn.Module,
        parent: nn.Module,
        argument: str,
        kind: SubblockKind,
        descriptor: Descriptor,
        statistics: Statistics,
    ) -> str:
        return "parent"


VARIANT = Parent()
