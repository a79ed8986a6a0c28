"""GPT-2: learned positions, q, k and v in one transposed projection (Conv1D), no gate, biases, tied head.

Its attention splits the fused projection by `split_size` and, with sdpa, shares KV heads by `num_key_value_groups`. Both are set when
the number of KV heads is reduced, so grouped attention needs no forward of its own.
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
    ffn_norms=("ln_2",),
    ffn_gate="",
    ffn_up="c_fc",
    ffn_down="c_proj",
    ffn_width="n_inner",
    unsupported={"add_cross_attention": (True,), "reorder_and_upcast_attn": (True,)},
    ignored_weights=(r"\.attn\.(masked_)?bias$",),
)
