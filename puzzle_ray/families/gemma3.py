"""Gemma 3, text only: Gemma 2's norms, a norm over each query and key head, and a rotary embedding for each type of layer."""

from puzzle_ray.families.descriptor import Descriptor

DESCRIPTOR = Descriptor(
    "gemma3_text",
    "Gemma3TextConfig",
    "Gemma3ForCausalLM",
    rotary_by_layer_type=True,
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    ffn_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    logits_softcap="final_logit_softcapping",
    unsupported={"use_bidirectional_attention": (True,)},
)
