"""Granite 3 (dense): Llama's layer with multipliers on embedding, attention scores, residual and logits."""

from puzzle_ray.families.descriptor import Descriptor

DESCRIPTOR = Descriptor(
    "granite",
    "GraniteConfig",
    "GraniteForCausalLM",
    embedding_multiplier="embedding_multiplier",
    logits_divisor="logits_scaling",
)
