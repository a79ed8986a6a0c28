"""Mistral 7B v0.2 and later (full attention). The sliding window of v0.1 is applied as transformers applies it."""

from puzzle_ray.families.descriptor import Descriptor

DESCRIPTOR = Descriptor("mistral", "MistralConfig", "MistralForCausalLM")
