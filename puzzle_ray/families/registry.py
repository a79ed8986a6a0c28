"""Finds the table of a family, and reads from a config what the table suffices for."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

from puzzle_ray.errors import ParentError
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.plugins import declared


@lru_cache(maxsize=1)
def families() -> dict[str, Descriptor]:
    """Every family with a file of its own, by its `model_type`."""
    descriptors: list[Descriptor] = declared("puzzle_ray.families", "DESCRIPTOR")
    return {descriptor.model_type: descriptor for descriptor in descriptors}


def descriptor_of(config: Any) -> Descriptor:
    """The table of a config's family, or Llama's table for a model type without one. It checks nothing.

    For a new parent call `puzzle_ray.models.describe.describe` first: it refuses settings that the table does not cover. Raises
    ParentError for a type that has no causal language model in transformers.
    """
    model_type = str(getattr(config, "model_type", "?")).removeprefix("puzzle_")
    return families().get(model_type) or llama_like(model_type)


def num_kv_heads(config: Any) -> int:
    """The parent's `num_key_value_heads`; where the config has none, there are as many as attention heads."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def ffn_width(config: Any) -> int:
    """The parent's FFN width, under whatever name its family has for it."""
    return int(getattr(config, descriptor_of(config).ffn_width, None) or 4 * config.hidden_size)


def complete_config(config: Any) -> Any:
    """Adds `num_key_value_heads` and `intermediate_size`, in place, to the config of a family that leaves them out."""
    if getattr(config, "num_key_value_heads", None) is None:
        config.num_key_value_heads = num_kv_heads(config)
    if getattr(config, "intermediate_size", None) is None:
        config.intermediate_size = ffn_width(config)
    return config


def unsupported_family(model_type: str, reason: str) -> ParentError:
    """The error for a model type that has no table and cannot use Llama's."""
    supported = ", ".join(sorted(families()))
    return ParentError("parent", f"family {model_type!r} is not supported: {reason}", f"supported: {supported}")


@cache
def llama_like(model_type: str) -> Descriptor:
    """Llama's table with the classes of another model type, unchecked. Raises ParentError if transformers has no such causal LM."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config_class = CONFIG_MAPPING_NAMES.get(model_type)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if not isinstance(config_class, str) or not isinstance(model_class, str):
        raise unsupported_family(model_type, "transformers has no causal language model of that type")
    return Descriptor(model_type, config_class, model_class)


def layer_type(config: Any, index: int) -> str:
    """The kind of a layer's attention, as transformers names it: `full_attention`, `sliding_attention`, ...; GPT-Neo: `global`, `local`."""
    types = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    return str(types[index]) if types else "full_attention"
