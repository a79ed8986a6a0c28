"""The model of a `nemotron-nas` (DeciLM) checkpoint: Llama with layers of their own shapes.

It is part of the code in an exported folder. What engines compute from a layer's `block_configs` is computed here, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel

from puzzle_ray.export.configuration_nemotron_nas import NemotronNasConfig
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.surgery.projections import resize_attention, resize_ffn
from puzzle_ray.surgery.shapes import linear_attention, linear_ffn, remove_attention, remove_ffn, with_begun_weights

LLAMA = Descriptor("nemotron-nas", "NemotronNasConfig", "DeciLMForCausalLM")
WIDTH_MULTIPLE = 256


def ffn_width(ffn_mult: float, hidden_size: int) -> int:
    """The width that engines compute from a multiplier: rounded up to a multiple of 256."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def reshape_block(layer: nn.Module, block: Any, config: Any) -> None:
    """Gives a layer of Llama the shape of its entry in `block_configs`, in place. Weights of what changes are undefined."""
    if getattr(config, "qkv_bias", False):
        attention = layer.self_attn
        for name in (LLAMA.query, LLAMA.key, LLAMA.value):
            linear: Any = getattr(attention, name)
            with torch.device("meta"):
                new = nn.Linear(linear.in_features, linear.out_features)
            setattr(attention, name, new.to(linear.weight.dtype).to_empty(device=linear.weight.device))
    if block.attention.no_op:
        remove_attention(layer, LLAMA)
    elif block.attention.replace_with_linear:
        linear_attention(layer, LLAMA)
    else:
        resize_attention(layer, config.num_attention_heads // block.attention.n_heads_in_group, LLAMA)
    if block.ffn.no_op:
        remove_ffn(layer, LLAMA)
    elif block.ffn.replace_with_linear:
        linear_ffn(layer, LLAMA, config.hidden_size)
    else:
        resize_ffn(layer, ffn_width(block.ffn.ffn_mult, config.hidden_size), LLAMA)


class DeciLayers:
    """Gives the layers their shapes. It stands before Llama's class among a class's bases."""

    config_class = NemotronNasConfig
    _keys_to_ignore_on_load_unexpected = None

    def __init__(self, config: Any, *args: Any, **settings: Any) -> None:
        config.num_key_value_heads, config.intermediate_size = (
            config.num_attention_heads,
            WIDTH_MULTIPLE,
        )  # each layer has its own
        super().__init__(config, *args, **settings)  # type: ignore[call-arg]
        config.num_key_value_heads = config.intermediate_size = None
        layers: nn.ModuleList = self.base_model.layers  # type: ignore[attr-defined]

        def reshape() -> None:
            for layer, block in zip(layers, config.block_configs, strict=True):
                reshape_block(layer, block, config)

        with_begun_weights(self, layers, reshape)


class DeciLMModel(DeciLayers, LlamaModel):
    """The model without its head."""


class DeciLMForCausalLM(DeciLayers, LlamaForCausalLM):
    """The causal language model."""
