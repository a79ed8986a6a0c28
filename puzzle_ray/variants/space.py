"""The search space of a parent: for every layer, the variants that a config names, resolved against the parent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from puzzle_ray.artifacts import KINDS, PARENT, LayerChoice, LayerSpace, SearchSpace, SubblockKind, to_json
from puzzle_ray.families.registry import complete_config, layer_type
from puzzle_ray.settings import Count, Section
from puzzle_ray.variants.base import resolve_variant, split_variant_name, variant_source


def search_space(config: Any, attention: tuple[str, ...], ffn: tuple[str, ...], multiple_of: int) -> SearchSpace:
    """The search space of a parent with transformers config `config`. `parent` is among the variants of every layer.

    Raises ConfigError where a variant does not suit the parent.
    """
    complete_config(config)

    def resolved(names: tuple[str, ...], kind: SubblockKind) -> tuple[str, ...]:
        return tuple(dict.fromkeys([PARENT, *(resolve_variant(name, kind, config, multiple_of) for name in names)]))

    a, f = resolved(attention, "attention"), resolved(ffn, "ffn")
    return SearchSpace(tuple(LayerSpace(a, f, layer_type(config, i)) for i in range(config.num_hidden_layers)))


_NARROWED = {"gqa": "heads", "gqa_prune": "heads", "ffn": "width", "ffn_iterative": "width"}  # variants that say one size


def is_less(variant: str, now: str) -> bool:
    """Whether a subblock that is `now` already can become `variant`, both counted from the original model."""
    (name, size), (own, own_size) = split_variant_name(variant), split_variant_name(now)
    if now == PARENT or variant == PARENT:
        return True
    if own == "noop" or name == own == "linear":
        return False
    if name == "noop" or (name == "linear" and (own in _NARROWED or own == "window")):
        return True
    if name not in _NARROWED or _NARROWED[name] != _NARROWED.get(own) or int(size) >= int(own_size):
        return False
    return _NARROWED[name] == "width" or int(own_size) % int(size) == 0


def onward(layer: LayerSpace, now: LayerChoice) -> LayerSpace:
    """What is left of a layer's variants where the parent is a child itself, whose layer is `now`: what is less than that."""
    kept = {kind: tuple(v for v in layer.variants(kind) if is_less(v, now.variant(kind))) for kind in KINDS}
    return replace(layer, attention=kept["attention"], ffn=kept["ffn"], now=now)


def space_sources(space: SearchSpace) -> dict[str, str]:
    """What identifies a search space: its variants, and the source of those that are not of this package."""
    found = {"space": to_json(space).decode()}
    for kind in KINDS:
        for name in dict.fromkeys(name for layer in space.layers for name in layer.variants(kind)):
            found |= variant_source(name, kind)
    return found


class SpaceConfig(Section):
    """The variants that every layer may have. Percentages are of the parent's number of KV heads, or of its FFN width.

    - `gqa:4`, `gqa:50%`: fewer key-value heads, each the mean of those it stands for;
    - `gqa_prune:4`: the most important key-value heads kept;
    - `window:128`: sliding-window attention;
    - `ffn:1024`, `ffn:50%`: the FFN channels that contribute most;
    - `ffn_iterative:1024`: channels dropped in rounds, the rest adjusted in between;
    - `linear`: one matrix in place of the subblock; `noop`: nothing in its place;
    - `package.module:ATTRIBUTE:ARGUMENT`: one of your own, see `puzzle_ray.variants.base`.
    """

    attention: tuple[str, ...] = ("parent", "gqa:50%", "gqa:25%", "linear", "noop")
    ffn: tuple[str, ...] = ("parent", "ffn:75%", "ffn:50%", "ffn:25%", "ffn:10%", "linear", "noop")
    ffn_multiple_of: Count = 8  # percentages of the FFN width are rounded to a multiple of this
