"""Model families. A family is one file here that defines `DESCRIPTOR`: where a layer's parts live and what can shrink.

A model type without a file that is shaped like Llama is described by `puzzle_ray.models.describe`, once it has passed a check of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from puzzle_ray.artifacts import SubblockKind

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Descriptor:
    """One table drives all surgery on a family. Module paths are relative to the model, or to what the comments say.

    A layer computes `x + attention(x)`, then `x + ffn(x)`: halves one after the other, each with its own norms before, after, or
    both. `unsupported` maps a config attribute to the values under which this descriptor is wrong, so that they are refused by
    name; `check` says in words what else is wrong with a config.
    """

    model_type: str
    config_class: str
    model_class: str
    embedding: str = "model.embed_tokens"
    positions: str = ""  # a learned position embedding
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    rotary_by_layer_type: bool = False
    head: str = "lm_head"
    attention: str = "self_attn"  # of a layer
    attention_core: str = ""  # of the attention: where its projections are, if deeper
    attention_norms: tuple[str, ...] = ("input_layernorm",)  # of a layer; dropped with a no-op
    layer_index: str = "layer_idx"  # attribute of the attention
    query: str = "q_proj"  # of the attention's core
    key: str = "k_proj"
    value: str = "v_proj"
    fused_qkv: str = ""  # one projection in place of the three
    output: str = "o_proj"
    query_norms: tuple[str, ...] = ()  # of the core: norms over all heads together (norms of each head need no care)
    key_norms: tuple[str, ...] = ()
    grouped_heads: bool = True  # False: the family's own forward knows one head count; see modules.GroupedAttention
    ffn: str = "mlp"  # of a layer: what turns into a no-op or a matrix
    ffn_core: str | None = None  # of a layer: where the FFN's projections are, if not in `ffn`
    ffn_norms: tuple[str, ...] = ("post_attention_layernorm",)
    ffn_rest: tuple[str, ...] = ()  # of a layer: the FFN's modules before `ffn`, in order; they go with it
    ffn_gate: str = "gate_proj"  # of the FFN's core; empty where there is none
    ffn_up: str = "up_proj"
    fused_gate_up: str = ""  # one projection in place of the two
    ffn_down: str = "down_proj"
    ffn_width: str = "intermediate_size"  # attribute of the config; where it is None, the width is 4 x hidden_size
    attn_implementation: str = "sdpa"
    embedding_multiplier: str = ""  # attribute of the config
    logits_divisor: str = ""  # attribute of the config
    logits_softcap: str = ""  # attribute of the config
    ignored_weights: tuple[str, ...] = ()  # patterns of names that old files hold and no forward reads: masks
    unsupported: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    check: Callable[[Any], str] | None = None

    def module(self, kind: SubblockKind) -> str:
        """Name of the subblock's main module inside a layer."""
        return self.attention if kind == "attention" else self.ffn

    def norms(self, kind: SubblockKind) -> tuple[str, ...]:
        """Names of everything else that belongs to the subblock: its norms, and modules that do nothing without the main one."""
        return self.attention_norms if kind == "attention" else (*self.ffn_norms, *self.ffn_rest)

    def prefixes(self, kind: SubblockKind) -> tuple[str, ...]:
        """The names in a layer's state dict that belong to one subblock start with one of these."""
        return tuple(f"{name}." for name in (self.module(kind), *self.norms(kind)))

    def entry(self, kind: SubblockKind) -> str:
        """Name of the module that takes the subblock's (normed) input."""
        return self.attention if kind == "attention" else (*self.ffn_rest, self.ffn)[0]

    def core(self, layer: nn.Module, kind: SubblockKind) -> nn.Module:
        """The module of a layer whose attributes the subblock's projections are."""
        if kind == "attention":
            attention = layer.get_submodule(self.attention)
            return attention.get_submodule(self.attention_core) if self.attention_core else attention
        return layer.get_submodule(self.ffn if self.ffn_core is None else self.ffn_core)
