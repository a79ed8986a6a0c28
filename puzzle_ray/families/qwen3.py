"""Qwen 3 (dense): Llama's layer with a norm over each query and key head."""

from puzzle_ray.families.descriptor import Descriptor

DESCRIPTOR = Descriptor("qwen3", "Qwen3Config", "Qwen3ForCausalLM", unsupported={"use_sliding_window": (True,)})
