"""GPT-Neo: learned positions, unscaled attention with its own eager forward, alternating global and local layers, no gate."""

from puzzle_ray.families.descriptor import Descriptor

DESCRIPTOR = Descriptor(
    "gpt_neo",
    "GPTNeoConfig",
    "GPTNeoForCausalLM",
    embedding="transformer.wte",
    positions="transformer.wpe",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    rotary="",
    attention="attn",
    attention_core="attention",
    attention_norms=("ln_1",),
    layer_index="layer_id",
    output="out_proj",
    grouped_heads=False,
    ffn_norms=("ln_2",),
    ffn_gate="",
    ffn_up="c_fc",
    ffn_down="c_proj",
    attn_implementation="eager",
    ignored_weights=(r"\.attn\.attention\.(masked_)?bias$",),
)
