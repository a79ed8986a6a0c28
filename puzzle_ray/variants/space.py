"""What every layer may become: the variants that a config names, resolved against one parent."""

from __future__ import annotations

from typing import Any

from puzzle_ray.artifacts import PARENT, LayerSpace, SearchSpace, SubblockKind
from puzzle_ray.families.registry import complete, layer_type
from puzzle_ray.settings import Count, Section
from puzzle_ray.variants.base import resolve


def search_space(config: Any, attention: tuple[str, ...], ffn: tuple[str, ...], multiple_of: int) -> SearchSpace:
    """The variants named in a config, resolved against this parent; `parent` is always among them."""
    complete(config)

    def resolved(names: tuple[str, ...], kind: SubblockKind) -> tuple[str, ...]:
        return tuple(dict.fromkeys([PARENT, *(resolve(name, kind, config, multiple_of) for name in names)]))

    a, f = resolved(attention, "attention"), resolved(ffn, "ffn")
    return SearchSpace(tuple(LayerSpace(a, f, layer_type(config, i)) for i in range(config.num_hidden_layers)))


class SpaceConfig(Section):
    """Variants offered to every layer. Percentages are of the parent's own count or width."""

    attention: tuple[str, ...] = ("parent", "gqa:50%", "gqa:25%", "linear", "noop")
    ffn: tuple[str, ...] = ("parent", "ffn:75%", "ffn:50%", "ffn:25%", "ffn:10%", "linear", "noop")
    ffn_multiple_of: Count = 8  # percentages of the FFN width are rounded to a multiple of this
