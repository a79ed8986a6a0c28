"""Attention with a window of a fixed number of tokens: its mask, and a cache layer that stores only the tokens of the window.

The mask is made from the mask that the model passes. In every row the window ends at the last token that the row may see. This holds
in training, in prefill, in cached decoding, with padding, and for rows of a batch at different positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from puzzle_ray.errors import ConfigError
from puzzle_ray.surgery.kv_cache import cache_among, length_with


def windowed_mask(
    mask: Tensor | None, window: int, tokens: int, keys: int, first: int, like: Tensor, additive: bool
) -> Tensor | None:
    """An attention mask under which a token sees itself and the `window - 1` tokens before it.

    `mask` is `[batch, 1, tokens, >= keys]`, boolean or additive; its last `keys` columns are used. None means causal attention of
    `tokens` queries on `keys` keys, with the first query at the position of key `first`. The new mask is then additive where
    `additive` is true, and boolean otherwise. Raises ConfigError where the mask has other than four dimensions.
    """
    if mask is None:
        is_causal = first == 0 or (tokens == 1 and keys == first + 1)  # sdpa without a mask computes this
        if keys <= window and is_causal and not additive:
            return None
        last = torch.arange(first, first + tokens, device=like.device)[:, None]
        positions = torch.arange(keys, device=like.device)
        seen = ((positions <= last) & (positions > last - window))[None, None]
        return _additive(seen, like) if additive else seen
    if mask.dim() != 4:
        raise ConfigError(
            "space.attention", "window needs masks of four dimensions", "run the model with sdpa or eager attention"
        )
    mask = mask[..., -keys:]
    lowest = None if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    visible = mask if lowest is None else mask > lowest / 2
    positions = torch.arange(mask.shape[-1], device=mask.device)
    last = torch.where(visible, positions, -1).amax(dim=-1, keepdim=True)
    outside = positions <= last - window
    return mask & ~outside if lowest is None else mask.masked_fill(outside, lowest)


def _additive(seen: Tensor, like: Tensor) -> Tensor:
    zeros = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
    return zeros.masked_fill_(~seen, torch.finfo(like.dtype).min)


class WindowLayer(DynamicSlidingWindowLayer):
    """A cache layer that stores the last `sliding_window - 1` tokens, in a cache whose other layers store all tokens.

    It reports the length of the whole sequence. So transformers makes masks that fit every layer, and this layer uses their last
    columns.
    """

    is_sliding = False

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        tokens = query_length if isinstance(query_length, int) else len(query_length)  # transformers 4: their positions
        return self.cumulative_length + tokens, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 4


def _cache_layer(cache: Any, index: int, window: int) -> Any:
    """The cache's layer `index`. An empty layer of the kind that stores every token is replaced by a WindowLayer."""
    layers = cache.layers
    if index == len(layers) and getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        layers.append(WindowLayer(window))
    elif type(layers[index]) is DynamicLayer and not layers[index].is_initialized:
        layers[index] = WindowLayer(window)
    return layers[index]


def _before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]
    window: int = module.window  # type: ignore[assignment]
    additive = check_windows(module.window_config) == "eager"
    tokens = hidden_states.shape[1]
    keys, first = tokens, 0
    cache = cache_among(kwargs)
    mask: Tensor | None = kwargs.get("attention_mask")
    if cache is not None:
        layer = _cache_layer(cache, module.window_layer_index, window)  # type: ignore[arg-type]
        first = int(layer.get_seq_length())
        keys = length_with(layer, tokens, hidden_states.device)
        mask = None if mask is None else mask[..., :keys]  # GPT-Neo's mask in transformers 4 has a column too many
        if isinstance(layer, WindowLayer):
            first = min(first, window - 1)
            keys = first + tokens
    elif mask is not None:
        keys = mask.shape[-1]
    narrowed = windowed_mask(mask, window, tokens, keys, first, hidden_states, additive)
    return args, {**kwargs, "attention_mask": narrowed}


def prepare_windows(cache: Any, attentions: Iterable[Any], records: bool) -> None:
    """Puts layers for windows into a cache that nothing was written to.

    Without this they are made at the first token. Assisted decoding needs them before: it asks every layer to keep what it may have to
    roll back. `records` is for caches that were asked already.
    """
    for attention in attentions:
        index = getattr(attention, "window_layer_index", len(cache.layers))
        layer = _cache_layer(cache, index, attention.window) if index < len(cache.layers) else None
        if records and isinstance(layer, WindowLayer) and hasattr(layer, "activate_past_recording"):  # transformers 5
            layer.activate_past_recording()


def check_windows(config: Any) -> str:
    """The attention implementation of a model, which must be one that can have windows in some layers. Raises ConfigError.

    None is for a layer that is not in a model yet.
    """
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager", None):
        problem = f"is {implementation!r}, and layers with windows of their own need masks of their own"
        raise ConfigError("attn_implementation", problem, "use sdpa or eager")
    return str(implementation)


def limit_window(attention: nn.Module, window: int, layer_index: int, config: Any) -> None:
    """Limits an attention of any family to a window of `window` tokens, in place. Its weights do not change.

    `config` is the one that the model reads its attention implementation from. Raises ConfigError for one that has no windows.
    """
    check_windows(config)
    attention.window_config = config
    attention.window = window  # type: ignore[assignment]
    attention.window_layer_index = layer_index  # type: ignore[assignment]
    attention.register_forward_pre_hook(_before_attention, with_kwargs=True)
