"""Gemma 2: norms before and after each half, sliding layers between full ones, soft caps on attention scores and logits.

Transformers has the cap on attention scores in its eager attention only, so that implementation is used.
"""

from puzzle_ray.families.descriptor import Descriptor

DESCRIPTOR = Descriptor(
    "gemma2",
    "Gemma2Config",
    "Gemma2ForCausalLM",
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    ffn_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    attn_implementation="eager",
    logits_softcap="final_logit_softcapping",
    unsupported={"use_bidirectional_attention": (True,)},
)
