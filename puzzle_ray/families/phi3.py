"""Phi-3 and Phi-3.5: Llama's layer with q, k and v in one projection, gate and up in another."""

from puzzle_ray.families.descriptor import Descriptor

DESCRIPTOR = Descriptor("phi3", "Phi3Config", "Phi3ForCausalLM", fused_qkv="qkv_proj", fused_gate_up="gate_up_proj")
