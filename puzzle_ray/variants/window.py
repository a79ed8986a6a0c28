"""`window:W`: the parent's attention, in which every token sees itself and the W - 1 tokens before it.

It is for parents with full attention. In transformers' dynamic cache such a layer stores the last W - 1 tokens only. Caches of fixed
size (the static cache, and the rows of the serving engine) store the whole length, and only the mask limits the window.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from puzzle_ray.artifacts import SubblockKind
from puzzle_ray.calibration import Statistics
from puzzle_ray.errors import ConfigError
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.surgery.shapes import WINDOW, narrow_window
from puzzle_ray.variants.base import fraction_or_count


class SlidingWindow:
    name = "window"
    kinds: tuple[SubblockKind, ...] = ("attention",)
    trainable = True
    needs: tuple[str, ...] = ()

    def resolve(self, argument: str, kind: SubblockKind, config: Any, multiple_of: int) -> str | None:
        types = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "attention_layers", None) or ())}
        if types - {"full_attention", "global"} or (not types and getattr(config, "sliding_window", None)):
            raise ConfigError(
                "space.attention",
                f"window:{argument}: the parent has sliding windows of its own",
                "drop it from the search space",
            )
        whole = int(config.max_position_embeddings)
        window = int(fraction_or_count(argument, whole, "space.attention"))
        if window < 2:
            raise ConfigError("space.attention", f"window:{argument} is too short", "write window:2 or more, or linear")
        return None if window >= whole else str(window)

    def reshape(self, layer: nn.Module, argument: str, kind: SubblockKind, descriptor: Descriptor, config: Any) -> None:
        narrow_window(layer, int(argument), descriptor)

    def words(self, argument: str, kind: SubblockKind, descriptor: Descriptor) -> dict[str, Any]:
        return {WINDOW: int(argument)}

    def initialise(
        self,
        layer: nn.Module,
        parent: nn.Module,
        argument: str,
        kind: SubblockKind,
        descriptor: Descriptor,
        statistics: Statistics,
    ) -> str:
        layer.get_submodule(descriptor.attention).load_state_dict(parent.get_submodule(descriptor.attention).state_dict())
        return "the parent's weights"


VARIANT = SlidingWindow()
