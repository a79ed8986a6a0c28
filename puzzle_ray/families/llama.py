"""Llama 1 to 3.x."""

from puzzle_ray.families.descriptor import Descriptor

DESCRIPTOR = Descriptor("llama", "LlamaConfig", "LlamaForCausalLM")
