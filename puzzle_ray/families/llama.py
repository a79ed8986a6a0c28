"""Llama 1 to 3.x."""

from puzzle_ray.families import Descriptor

DESCRIPTOR = Descriptor("llama", "LlamaConfig", "LlamaForCausalLM")
