"""The config classes of children, one for each family. They need transformers, and torch only once a config is made.

A child of family F has model type `puzzle_F`. Its config is the parent's config plus `puzzle_layers`, one
`{"attention": name, "ffn": name}` per layer, and `per_layer_config`, the shapes that these names stand for, in transformers' words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.errors import ParentError
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.families.registry import complete_config, families, llama_like
from puzzle_ray.models.child_settings import ChildSettings, words_of_layers
from puzzle_ray.models.folder_code import Names


def _shapes(layers: Sequence[Mapping[str, str]], descriptor: Descriptor) -> list[dict[str, Any]] | None:
    """The words of all layers; None where a variant has none."""
    from puzzle_ray.variants.base import layer_words

    found = [layer_words(LayerChoice(**layer), descriptor) for layer in layers]
    return None if any(words is None for words in found) else [words for words in found if words is not None]


def _settings(descriptor: Descriptor, layers: Sequence[Mapping[str, str]], settings: dict[str, Any]) -> dict[str, Any]:
    """A child's settings with the shapes and the classes that go with its variants."""
    shapes = _shapes(layers, descriptor)
    settings.pop("auto_map", None)
    if descriptor.logits_divisor in settings:
        settings["logit_scale"] = 1.0 / settings[descriptor.logits_divisor]  # vLLM's word; it reads no other
    if shapes is None:  # the code in the folder could not build these
        settings.pop("per_layer_config", None)
        return settings
    settings.setdefault("per_layer_config", {str(index): words for index, words in enumerate(shapes) if words})
    return settings | {"auto_map": Names.of(descriptor).auto_map}


def _check_shapes(config: Any, descriptor: Descriptor) -> None:
    """Raises ParentError where names and shapes of a config do not say the same."""
    shapes = _shapes(config.puzzle_layers, descriptor)
    if shapes is None:
        return
    for index, (named, stored) in enumerate(zip(shapes, words_of_layers(config), strict=True)):
        differing = {word: value for word, value in named.items() if value != getattr(config, word, None)}
        if {k: _plain(v) for k, v in differing.items()} != {k: _plain(v) for k, v in stored.items()}:
            problem = f"config.json names {config.puzzle_layers[index]} for layer {index}, and its per_layer_config says {stored}"
            raise ParentError("child", problem, "take config.json as puzzle_ray wrote it")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


@cache
def child_config_class(model_type: str) -> type:
    """The config class of children of one family."""
    import transformers

    descriptor = families().get(model_type) or llama_like(model_type)

    def init_config(self: Any, puzzle_layers: Sequence[Mapping[str, str]] | None = None, **settings: Any) -> None:
        layers = [dict(layer) for layer in puzzle_layers or ()]
        ChildSettings.__init__(self, puzzle_layers=layers, **_settings(descriptor, layers, settings))
        if layers:
            complete_config(self)
            _check_shapes(self, descriptor)

    members = {"model_type": f"puzzle_{model_type}", "__init__": init_config, "__module__": __name__}
    return type(f"Puzzle{descriptor.config_class}", (ChildSettings, getattr(transformers, descriptor.config_class)), members)


@cache
def register_config(model_type: str) -> None:
    """Registers one family's children with `AutoConfig`."""
    from transformers import AutoConfig

    config_class = child_config_class(model_type)
    AutoConfig.register(config_class.model_type, config_class)  # type: ignore[attr-defined]


def register_configs() -> None:
    """Registers the children of every family with `AutoConfig`."""
    for model_type in families():
        register_config(model_type)
