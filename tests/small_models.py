"""Random models small enough for every test."""

from __future__ import annotations

from pathlib import Path

import torch

SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
OF_FAMILY: dict[str, dict] = {
    "phi3": {"original_max_position_embeddings": 128},
    "gemma2": {"layer_types": SLIDING, "sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"layer_types": SLIDING, "sliding_window": 6, "query_pre_attn_scalar": 8, "final_logit_softcapping": 20.0},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 4.0,
    },
    "gpt2": {"n_inner": 48, "num_key_value_heads": None},
    "gpt_neo": {
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": 6,
        "num_key_value_heads": None,
    },
    "opt": {"ffn_dim": 48, "num_key_value_heads": None, "word_embed_proj_dim": 32},
}


def tiny_config(model_type: str = "llama", **changes):
    from transformers import AutoConfig

    settings = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(model_type, **(settings | OF_FAMILY.get(model_type, {}) | changes))


def save_parent(folder: Path, model_type: str = "llama", seed: int = 0, **changes) -> Path:
    """A random model of the family, its weights large enough that blocks matter."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
            elif "norm" in name and "bias" not in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder
