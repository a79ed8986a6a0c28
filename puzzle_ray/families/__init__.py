"""Model families. A family is one file here that defines `DESCRIPTOR`: where a layer's parts live and what can shrink."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from puzzle_ray.artifacts import SubblockKind
from puzzle_ray.errors import ParentError
from puzzle_ray.plugins import modules_of


@dataclass(frozen=True)
class Descriptor:
    """One table drives all surgery on a family. Module paths are relative to the model, or to a layer where said so.

    A layer computes `x + attention(norm(x))`, then `x + ffn(norm(x))`: halves one after the other, each behind its norms.
    `unsupported` maps a config attribute to the values under which this descriptor is wrong, so that they are refused by name.
    """

    model_type: str
    config_class: str
    model_class: str
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    head: str = "lm_head"
    attention: str = "self_attn"  # of a layer
    attention_norms: tuple[str, ...] = ("input_layernorm",)  # of a layer; dropped with a no-op
    query: str = "q_proj"  # of the attention
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    ffn: str = "mlp"  # of a layer
    ffn_norms: tuple[str, ...] = ("post_attention_layernorm",)
    ffn_gate: str = "gate_proj"  # of the ffn
    ffn_up: str = "up_proj"
    ffn_down: str = "down_proj"
    unsupported: Mapping[str, tuple[object, ...]] = ()  # type: ignore[assignment]

    def module(self, kind: SubblockKind) -> str:
        """Name of the subblock's main module inside a layer."""
        return self.attention if kind == "attention" else self.ffn

    def norms(self, kind: SubblockKind) -> tuple[str, ...]:
        return self.attention_norms if kind == "attention" else self.ffn_norms

    def prefixes(self, kind: SubblockKind) -> tuple[str, ...]:
        """The names in a layer's state dict that belong to one subblock start with one of these."""
        return tuple(f"{name}." for name in (self.module(kind), *self.norms(kind)))


@lru_cache(maxsize=1)
def families() -> dict[str, Descriptor]:
    """Every family by its `model_type`."""
    return {module.DESCRIPTOR.model_type: module.DESCRIPTOR for module in modules_of(sys.modules[__name__])}


def describe(config: object) -> Descriptor:
    """The descriptor for a transformers config. Raises ParentError where the family, or a setting of it, is not supported."""
    model_type = str(getattr(config, "model_type", "?")).removeprefix("puzzle_")
    if model_type not in families():
        raise ParentError("parent", f"family {model_type!r} is not supported", f"supported: {', '.join(sorted(families()))}")
    descriptor = families()[model_type]
    for name, values in dict(descriptor.unsupported).items():
        if getattr(config, name, None) in values:
            raise ParentError("parent", f"{model_type} with {name}={getattr(config, name)!r} is not supported")
    return descriptor
