"""StarCoder2: LayerNorms and biases everywhere, an FFN without a gate."""

from puzzle_ray.families.descriptor import Descriptor

DESCRIPTOR = Descriptor("starcoder2", "Starcoder2Config", "Starcoder2ForCausalLM", ffn_gate="", ffn_up="c_fc", ffn_down="c_proj")
