"""The search space of a run, kept within what a target format can say."""

from __future__ import annotations

from dataclasses import replace
from math import lcm
from typing import Any

from puzzle_ray.artifacts import KINDS, LayerChoice, LayerSpace, SearchSpace
from puzzle_ray.errors import ConfigError
from puzzle_ray.export.engine_rules import problems_of_config
from puzzle_ray.export.nemotron_nas import WIDTH_MULTIPLE, nas_config
from puzzle_ray.models.child import choices_of, original_config
from puzzle_ray.variants.space import SpaceConfig, onward, search_space


def configured_space(config: Any, space: SpaceConfig, target_format: str) -> SearchSpace:
    """The search space of a parent. With target format `nemotron_nas`, without what vLLM cannot run in that format.

    Percentages of FFN widths are then rounded to multiples of 256. Where the parent is a child itself, names and percentages are of the
    model that it was made of in the first place, and every layer has those that are less than what it is. Raises ParentError where the
    format has no place for the parent, and ConfigError where a variant does not suit the parent.
    """
    whole = _of_original(original_config(config), space, target_format)
    return SearchSpace(tuple(onward(layer, now) for layer, now in zip(whole.layers, choices_of(config), strict=True)))


def _of_original(config: Any, space: SpaceConfig, target_format: str) -> SearchSpace:
    if target_format != "nemotron_nas":
        return search_space(config, space.attention, space.ffn, space.ffn_multiple_of)
    nas_config(config, [LayerChoice()] * config.num_hidden_layers, "bfloat16")  # raises for the parent
    whole = search_space(config, space.attention, space.ffn, lcm(space.ffn_multiple_of, WIDTH_MULTIPLE))
    return SearchSpace(tuple(_within(layer, index, config) for index, layer in enumerate(whole.layers)))


def _within(layer: LayerSpace, index: int, config: Any) -> LayerSpace:
    kept = {kind: tuple(v for v in layer.variants(kind) if _fits(LayerChoice(**{kind: v}), index, config)) for kind in KINDS}
    return replace(layer, attention=kept["attention"], ffn=kept["ffn"])


def _fits(choice: LayerChoice, index: int, config: Any) -> bool:
    """Whether vLLM runs the choice, in the first layer or in a later one."""
    choices = [choice] if index == 0 else [LayerChoice(), choice]
    try:
        settings = nas_config(config, choices, "bfloat16")
    except ConfigError:
        return False
    return not problems_of_config("vllm", settings)
