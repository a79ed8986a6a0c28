"""The weight of every layer in the cosine loss of global distillation."""

from __future__ import annotations

from typing import Any

from puzzle_ray.distill.settings import GkdConfig
from puzzle_ray.errors import ConfigError


def layer_weights(config: GkdConfig, child_config: Any) -> tuple[float, ...]:
    """The weight of every layer in the cosine loss. Raises ConfigError where a list of weights is not as long as the model is deep."""
    layers, wanted = int(child_config.num_hidden_layers), config.cosine_layers
    if wanted == "all":
        return (1.0,) * layers
    if wanted == "kept":
        names = getattr(child_config, "puzzle_layers", None) or [{}] * layers
        kept = tuple(float({layer.get("attention"), layer.get("ffn")} != {"noop"}) for layer in names)
        return kept if any(kept) else (1.0,) * layers
    if len(wanted) != layers:
        raise ConfigError("gkd.cosine_layers", f"{len(wanted)} weights for {layers} layers", "give one weight per layer")
    return tuple(wanted)
