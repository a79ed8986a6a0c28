"""OLMo 2: norms after each half only, and one norm over all query heads and one over all key heads."""

from puzzle_ray.families.descriptor import Descriptor

DESCRIPTOR = Descriptor(
    "olmo2",
    "Olmo2Config",
    "Olmo2ForCausalLM",
    attention_norms=("post_attention_layernorm",),
    ffn_norms=("post_feedforward_layernorm",),
    query_norms=("q_norm",),
    key_norms=("k_norm",),
)
