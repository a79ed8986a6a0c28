"""Shapes of parents whose files the hub gives out by consent alone, so that `plan` needs neither the hub nor a download.

They are the numbers of their config.json as published; a test compares the parameters with those of the model cards.
"""

from __future__ import annotations

from typing import Any

_LLAMA_3 = {
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
_8B = {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32}
_70B = {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3 | _8B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_3 | _70B,
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_3 | _70B,
}


def published_config(parent: str) -> Any:
    """A transformers config of that shape; None for another parent. Rotary settings are transformers' own: no size depends on them."""
    from transformers import AutoConfig

    shape = SHAPES.get(parent)
    return None if shape is None else AutoConfig.for_model(**shape)
