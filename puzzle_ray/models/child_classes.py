"""The model classes of children, two for each family, and the registration of children with transformers.

A child's class builds the parent's layers, gives each the modules of its choice, and then transformers loads the weights by name.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.families.registry import families, llama_like
from puzzle_ray.models.checkpoint import read_json
from puzzle_ray.models.child_configs import child_config_class, register_config
from puzzle_ray.models.child_surgery import ChildLayers
from puzzle_ray.models.folder_code import Names, write_code
from puzzle_ray.variants.base import reshape_layer

MAX_SHARD_SIZE = "5GB"
FILE_MODE = 0o644


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

    def reshape(self: Any, layers: Any, config: Any) -> None:
        choices = [LayerChoice(**layer) for layer in config.puzzle_layers]
        for choice, layer in zip(choices, layers, strict=True):
            reshape_layer(layer, choice, descriptor, config)

    where = {"__module__": __name__}
    config_class = child_config_class(model_type)
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
    from transformers import AutoModel, AutoModelForCausalLM

    config_class, base_class, model_class = all_classes(model_type)
    register_config(model_type)
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
