"""GPT-2: learned positions, q, k and v in one transposed projection (Conv1D), no gate, biases, tied head.

Its eager attention has as many KV heads as query heads, so fewer of them need a forward of ours.
"""

from puzzle_ray.families.descriptor import Descriptor

DESCRIPTOR = Descriptor(
    "gpt2",
    "GPT2Config",
    "GPT2LMHeadModel",
    embedding="transformer.wte",
    positions="transformer.wpe",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    rotary="",
    attention="attn",
    attention_norms=("ln_1",),
    fused_qkv="c_attn",
    output="c_proj",
    grouped_heads=False,
    ffn_norms=("ln_2",),
    ffn_gate="",
    ffn_up="c_fc",
    ffn_down="c_proj",
    ffn_width="n_inner",
    unsupported={"add_cross_attention": (True,), "reorder_and_upcast_attn": (True,)},
    ignored_weights=(r"\.attn\.(masked_)?bias$",),
)
