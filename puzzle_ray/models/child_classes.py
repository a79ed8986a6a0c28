"""The classes of children, one config class and two model classes for each family, and their registration with transformers.

A child of family F has model type `puzzle_F`. Its config is the parent's config plus `puzzle_layers`, one
`{"attention": name, "ffn": name}` per layer, and `per_layer_config`, the shapes that these names stand for, in transformers' words. Its
class builds the parent's layers, gives each the modules of its choice, and then transformers loads the weights by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.errors import ParentError
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.families.registry import complete_config, families, llama_like
from puzzle_ray.models.blocks import reshape_layer
from puzzle_ray.models.checkpoint import read_json
from puzzle_ray.models.child_settings import ChildSettings, words_of_layers
from puzzle_ray.models.child_surgery import ChildLayers
from puzzle_ray.models.folder_code import Names, write_code
from puzzle_ray.variants.base import layer_words

MAX_SHARD_SIZE = "5GB"
FILE_MODE = 0o644


def _shapes(layers: Sequence[Mapping[str, str]], descriptor: Descriptor) -> list[dict[str, Any]] | None:
    """The words of all layers; None where a variant has none."""
    found = [layer_words(LayerChoice(**layer), descriptor) for layer in layers]
    return None if any(words is None for words in found) else [words for words in found if words is not None]


def _settings(descriptor: Descriptor, layers: Sequence[Mapping[str, str]], settings: dict[str, Any]) -> dict[str, Any]:
    """A child's settings with the shapes and the classes that go with its variants."""
    shapes = _shapes(layers, descriptor)
    settings.pop("auto_map", None)
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
def child_classes(model_type: str) -> tuple[type, type]:
    """The config class and the causal language model's class of children of one family."""
    config_class, _, model_class = all_classes(model_type)
    return config_class, model_class


@cache
def all_classes(model_type: str) -> tuple[type, type, type]:
    """The config class, the class without a head and the causal language model's class of children of one family."""
    import transformers

    descriptor = families().get(model_type) or llama_like(model_type)
    names = Names.of(descriptor)

    def init_config(self: Any, puzzle_layers: Sequence[Mapping[str, str]] | None = None, **settings: Any) -> None:
        layers = [dict(layer) for layer in puzzle_layers or ()]
        ChildSettings.__init__(self, puzzle_layers=layers, **_settings(descriptor, layers, settings))
        if layers:
            complete_config(self)
            _check_shapes(self, descriptor)

    def reshape(self: Any, layers: Any, config: Any) -> None:
        choices = [LayerChoice(**layer) for layer in config.puzzle_layers]
        for choice, layer in zip(choices, layers, strict=True):
            reshape_layer(layer, choice, descriptor, config)

    where = {"__module__": __name__}
    config_base = getattr(transformers, descriptor.config_class)
    config_members = {"model_type": f"puzzle_{model_type}", "__init__": init_config, **where}
    config_class = type(names.config, (ChildSettings, config_base), config_members)
    members = {"config_class": config_class, "descriptor": descriptor, "reshape": reshape, **where}

    def model_class(name: str, base: Any) -> type:
        return type(name, (ChildLayers, base), members | {"save_pretrained": _saving(base, descriptor)})

    base_class = model_class(names.base_model, getattr(transformers, names.base))
    return config_class, base_class, model_class(names.model, getattr(transformers, descriptor.model_class))


def _saving(base: Any, descriptor: Descriptor) -> Any:
    """The method `save_pretrained` of a child: also writes the code to load it, and nothing that others may not read."""

    def save_pretrained(self: Any, save_directory: Any, max_shard_size: Any = MAX_SHARD_SIZE, **options: Any) -> None:
        base.save_pretrained(self, save_directory, max_shard_size=max_shard_size, **options)
        folder = Path(save_directory)
        if getattr(self.config, "auto_map", None):
            write_code(folder, descriptor)
        for file in folder.iterdir():  # safetensors' files are for their owner alone
            if file.is_file():
                file.chmod(FILE_MODE)

    return save_pretrained


@cache
def _register(model_type: str) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config_class, base_class, model_class = all_classes(model_type)
    AutoConfig.register(config_class.model_type, config_class)  # type: ignore[attr-defined]
    AutoModel.register(config_class, base_class)
    AutoModelForCausalLM.register(config_class, model_class)


def register_children(folder: Path | None = None) -> None:
    """Registers the `puzzle_*` type of every family with transformers' Auto classes.

    Where `folder` has a child of a family without a table, its type is registered too.
    """
    for model_type in families():
        _register(model_type)
    file = folder / "config.json" if folder else None
    if file is not None and file.is_file():
        model_type = str(read_json(file).get("model_type", ""))
        if model_type.startswith("puzzle_"):
            _register(model_type.removeprefix("puzzle_"))
