"""OPT: learned positions with an offset, biases, no gate; the FFN's projections are attributes of the layer itself."""

from typing import Any

from puzzle_ray.families.descriptor import Descriptor


def _check(config: Any) -> str:
    if config.word_embed_proj_dim != config.hidden_size:
        return f"word_embed_proj_dim={config.word_embed_proj_dim} other than hidden_size={config.hidden_size}"
    return ""


DESCRIPTOR = Descriptor(
    "opt",
    "OPTConfig",
    "OPTForCausalLM",
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    layers="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    rotary="",
    attention_norms=("self_attn_layer_norm",),
    output="out_proj",
    grouped_heads=False,
    ffn="fc2",
    ffn_core="",
    ffn_norms=("final_layer_norm",),
    ffn_rest=("fc1", "activation_fn"),
    ffn_gate="",
    ffn_up="fc1",
    ffn_down="fc2",
    ffn_width="ffn_dim",
    masks_by_positions=False,
    unsupported={"do_layer_norm_before": (False,), "_remove_final_layer_norm": (True,)},
    check=_check,
)
