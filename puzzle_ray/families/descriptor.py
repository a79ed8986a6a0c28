"""The table of a model family: the names of a layer's modules, and which of them can be made smaller.

A family is one file here that defines `DESCRIPTOR`. A model type without such a file may be shaped like Llama. Then
`puzzle_ray.models.describe` gives it Llama's table, after a check.
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
    """One table for everything that replaces or resizes parts of a family's layers.

    Names of modules are relative to the model, or to the module that the comment names. A layer computes `x + attention(x)`, and then
    `x + ffn(x)`. Each half has its own norms before it, after it, or both.

    `unsupported` maps an attribute of the config to values for which this table is wrong. A parent with such a value is refused.
    `check` returns in words what else is wrong with a config, or the empty string.
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
    attention_core: str = ""  # of the attention: the module with its projections, if it is not the attention itself
    attention_norms: tuple[str, ...] = ("input_layernorm",)  # of a layer; removed with a no-op
    layer_index: str = "layer_idx"  # attribute of the attention
    query: str = "q_proj"  # of the attention's core
    key: str = "k_proj"
    value: str = "v_proj"
    fused_qkv: str = ""  # one projection in place of the three
    output: str = "o_proj"
    query_norms: tuple[str, ...] = ()  # of the core: norms over all heads together (norms over each head stay as they are)
    key_norms: tuple[str, ...] = ()
    grouped_heads: bool = True  # False: its own forward has no grouped KV heads; see surgery.subblocks.GroupedAttention
    ffn: str = "mlp"  # of a layer: the module that a no-op or a matrix replaces
    ffn_core: str | None = None  # of a layer: the module with the FFN's projections, if it is not `ffn`
    ffn_norms: tuple[str, ...] = ("post_attention_layernorm",)
    ffn_rest: tuple[str, ...] = ()  # of a layer: the FFN's modules before `ffn`, in order; they are replaced with it
    ffn_gate: str = "gate_proj"  # of the FFN's core; empty where there is none
    ffn_up: str = "up_proj"
    fused_gate_up: str = ""  # one projection in place of the two
    ffn_down: str = "down_proj"
    ffn_width: str = "intermediate_size"  # attribute of the config; where it is None, the width is 4 x hidden_size
    attn_implementation: str = "sdpa"
    embedding_multiplier: str = ""  # attribute of the config
    logits_divisor: str = ""  # attribute of the config
    logits_softcap: str = ""  # attribute of the config
    masks_by_positions: bool = True  # False: the model does not look at position ids for where documents begin
    ignored_weights: tuple[str, ...] = ()  # patterns of names that old files hold and no forward reads: masks
    unsupported: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    check: Callable[[Any], str] | None = None

    def module(self, kind: SubblockKind) -> str:
        """The name of the subblock's main module inside a layer."""
        return self.attention if kind == "attention" else self.ffn

    def norms(self, kind: SubblockKind) -> tuple[str, ...]:
        """The names of the other modules of the subblock: its norms, and modules that have no use without the main one."""
        return self.attention_norms if kind == "attention" else (*self.ffn_norms, *self.ffn_rest)

    def prefixes(self, kind: SubblockKind) -> tuple[str, ...]:
        """Prefixes of the names in a layer's state dict that belong to the subblock."""
        return tuple(f"{name}." for name in (self.module(kind), *self.norms(kind)))

    def entry(self, kind: SubblockKind) -> str:
        """The name of the module that takes the subblock's input, behind the norm."""
        return self.attention if kind == "attention" else (*self.ffn_rest, self.ffn)[0]

    def core(self, layer: nn.Module, kind: SubblockKind) -> nn.Module:
        """The module of a layer that has the subblock's projections as attributes."""
        if kind == "attention":
            attention = layer.get_submodule(self.attention)
            return attention.get_submodule(self.attention_core) if self.attention_core else attention
        return layer.get_submodule(self.ffn if self.ffn_core is None else self.ffn_core)
