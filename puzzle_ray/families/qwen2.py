"""Qwen 2 and 2.5: Llama's layer with biases on q, k and v."""

from puzzle_ray.families.descriptor import Descriptor

DESCRIPTOR = Descriptor("qwen2", "Qwen2Config", "Qwen2ForCausalLM", unsupported={"use_sliding_window": (True,)})
