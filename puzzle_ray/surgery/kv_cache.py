"""The name of the KV cache in transformers: `past_key_values` up to 5.23, `cache` from 5.24. GPT-Neo's layers call it `layer_past`.

Transformers 4 also passes the positions at which a cache is written, `cache_position`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache that a layer or an attention was called with, or None."""
    cache = arguments.get(NAME)
    return arguments.get("layer_past") if cache is None else cache


def add_to_cache(cache: Any, key: Tensor, value: Tensor, layer_idx: int, arguments: Mapping[str, Any]) -> Any:
    """Writes keys and values to a layer of the cache; returns all of the layer's. `arguments` are those of the attention's call."""
    position = arguments.get("cache_position")
    more = () if position is None else ({"cache_position": position},)
    return cache.update(key, value, layer_idx, *more)


def length_with(layer: Any, tokens: int, device: torch.device) -> int:
    """How many keys a layer of a cache has after `tokens` more: those that a mask must cover."""
    by_position = "cache_position" in signature(DynamicLayer.get_mask_sizes).parameters  # transformers 4
    return int(layer.get_mask_sizes(torch.arange(tokens, device=device) if by_position else tokens)[0])


def cache_from(output: Any) -> Any:
    """The cache in the output of a model's forward."""
    return getattr(output, NAME)


def continuing(cache: Any) -> dict[str, Any]:
    """Arguments with which a model's forward continues from a cache and adds to it."""
    return {NAME: cache, "use_cache": True}
