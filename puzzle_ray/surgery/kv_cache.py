"""The name of the KV cache in transformers: `past_key_values` up to 5.23, `cache` from 5.24. GPT-Neo's layers call it `layer_past`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache that a layer or an attention was called with, or None."""
    cache = arguments.get(NAME)
    return arguments.get("layer_past") if cache is None else cache


def cache_from(output: Any) -> Any:
    """The cache in the output of a model's forward."""
    return getattr(output, NAME)


def continuing(cache: Any) -> dict[str, Any]:
    """Arguments with which a model's forward continues from a cache and adds to it."""
    return {NAME: cache, "use_cache": True}
