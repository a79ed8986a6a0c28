"""The projections of a layer as `[out, in]` weights, for every family, whether they are fused, transposed or neither."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.surgery.subblocks import GroupedAttention


@dataclass(frozen=True)
class Projection:
    """Views of a projection's parameters: `weight_OI` is `[out, in]`, `bias_O` is `[out]`. Writing to them changes the module."""

    weight_OI: Tensor
    bias_O: Tensor | None

    @classmethod
    def of(cls, linear: nn.Module) -> Projection:
        weight: Tensor = linear.weight.detach()  # type: ignore[operator]
        bias: Tensor | None = linear.bias  # type: ignore[assignment]
        return cls(weight.T if isinstance(linear, Conv1D) else weight, None if bias is None else bias.detach())

    def split(self, lengths: tuple[int, ...]) -> tuple[Projection, ...]:
        """Divides a fused projection into consecutive groups of rows."""
        weights = self.weight_OI.split(lengths)
        biases = [None] * len(lengths) if self.bias_O is None else self.bias_O.split(lengths)
        return tuple(Projection(w, b) for w, b in zip(weights, biases, strict=True))

    def write(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        copy_checked(self.weight_OI, weight_OI)
        if self.bias_O is not None and bias_O is not None:
            copy_checked(self.bias_O, bias_O)

    def write_rows(self, source: Projection, rows: Tensor) -> None:
        self.write(source.weight_OI[rows], None if source.bias_O is None else source.bias_O[rows])


@dataclass(frozen=True)
class AttentionProjections:
    """The projections of an attention.

    `query` is `[num_attention_heads * head_dim, hidden_size]`, `key` and `value` are `[num_key_value_heads * head_dim, hidden_size]`,
    and `output` is `[hidden_size, num_attention_heads * head_dim]`.
    """

    query: Projection
    key: Projection
    value: Projection
    output: Projection
    head_dim: int

    @classmethod
    def of(cls, layer: nn.Module, descriptor: Descriptor) -> AttentionProjections:
        core = descriptor.core(layer, "attention")
        head_dim: int = core.head_dim  # type: ignore[assignment]
        output = Projection.of(getattr(core, descriptor.output))
        if descriptor.fused_qkv:
            fused = Projection.of(getattr(core, descriptor.fused_qkv))
            queries = output.weight_OI.shape[1]
            keys = (fused.weight_OI.shape[0] - queries) // 2
            query, key, value = fused.split((queries, keys, keys))
        else:
            query, key, value = (
                Projection.of(getattr(core, name)) for name in (descriptor.query, descriptor.key, descriptor.value)
            )
        return cls(query, key, value, output, head_dim)

    @property
    def values_by_query_head(self) -> Projection:
        """The value projection with the rows of every KV head once for each of its query heads."""
        groups = self.num_heads // self.num_kv_heads

        def repeated(rows: Tensor) -> Tensor:
            return rows.unflatten(0, (-1, self.head_dim)).repeat_interleave(groups, dim=0).flatten(0, 1)

        bias = self.value.bias_O
        return Projection(repeated(self.value.weight_OI), None if bias is None else repeated(bias))

    @property
    def num_heads(self) -> int:
        return self.query.weight_OI.shape[0] // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        return self.key.weight_OI.shape[0] // self.head_dim


@dataclass(frozen=True)
class FFNProjections:
    """The projections of an FFN.

    `inner` are the gate, where there is one, and the up projection, each `[channels, hidden_size]`. `down` is
    `[hidden_size, channels]`.
    """

    inner: tuple[Projection, ...]
    down: Projection

    @classmethod
    def of(cls, layer: nn.Module, descriptor: Descriptor) -> FFNProjections:
        core = descriptor.core(layer, "ffn")
        down = Projection.of(getattr(core, descriptor.ffn_down))
        if descriptor.fused_gate_up:
            width = down.weight_OI.shape[1]
            inner = Projection.of(getattr(core, descriptor.fused_gate_up)).split((width, width))
        else:
            inner = tuple(Projection.of(getattr(core, name)) for name in (descriptor.ffn_gate, descriptor.ffn_up) if name)
        return cls(inner, down)

    @property
    def up(self) -> Projection:
        return self.inner[-1]

    @property
    def width(self) -> int:
        return self.down.weight_OI.shape[1]

    def copy_channels(self, parent: FFNProjections, channels: Tensor) -> None:
        """Copies some channels of a wider FFN into this one."""
        for target, source in zip(self.inner, parent.inner, strict=True):
            target.write_rows(source, channels)
        self.down.write(parent.down.weight_OI[:, channels], parent.down.bias_O)


def resize_attention(layer: nn.Module, num_kv_heads: int, descriptor: Descriptor) -> None:
    """Gives an attention `num_kv_heads` key-value heads, in place.

    The projections that change their size, or the whole fused projection, have undefined weights afterwards.
    """
    core = descriptor.core(layer, "attention")
    old = AttentionProjections.of(layer, descriptor)
    queries, keys = old.query.weight_OI.shape[0], num_kv_heads * old.head_dim
    if descriptor.fused_qkv:
        fused = getattr(core, descriptor.fused_qkv)
        setattr(core, descriptor.fused_qkv, resize_linear(fused, linear_sizes(fused)[0], queries + 2 * keys))
        core.num_key_value_heads = num_kv_heads  # type: ignore[assignment]
    else:
        for name in (descriptor.key, descriptor.value):
            linear = getattr(core, name)
            setattr(core, name, resize_linear(linear, linear_sizes(linear)[0], keys))
    for name in descriptor.key_norms:
        setattr(core, name, resize_norm(getattr(core, name), keys))
    core.num_key_value_groups = old.num_heads // num_kv_heads  # type: ignore[assignment]
    if not descriptor.grouped_heads:
        grouped = GroupedAttention(core, descriptor, old.num_heads // num_kv_heads)
        layer.set_submodule(".".join(name for name in (descriptor.attention, descriptor.attention_core) if name), grouped)


def resize_ffn(layer: nn.Module, width: int, descriptor: Descriptor) -> None:
    """Gives an FFN `width` channels, in place. Its weights are undefined afterwards."""
    core = descriptor.core(layer, "ffn")
    inner = (descriptor.fused_gate_up,) if descriptor.fused_gate_up else (descriptor.ffn_gate, descriptor.ffn_up)
    for name in filter(None, inner):
        linear = getattr(core, name)
        setattr(core, name, resize_linear(linear, linear_sizes(linear)[0], width * (2 if descriptor.fused_gate_up else 1)))
    down = getattr(core, descriptor.ffn_down)
    setattr(core, descriptor.ffn_down, resize_linear(down, width, linear_sizes(down)[1]))
    if hasattr(core, "intermediate_size"):
        core.intermediate_size = width  # type: ignore[assignment]


def linear_sizes(linear: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a Linear or a Conv1D."""
    if isinstance(linear, Conv1D):
        return int(linear.nx), int(linear.nf)
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features


def resize_linear(linear: nn.Module, in_features: int, out_features: int) -> nn.Module:
    """An uninitialised Linear or Conv1D of another size, with the same dtype and device, and with a bias if the old one has it."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    with torch.device("meta"):
        if isinstance(linear, Conv1D):
            new: nn.Module = Conv1D(out_features, in_features)
        else:
            new = nn.Linear(in_features, out_features, bias=linear.bias is not None)
    return new.to(weight.dtype).to_empty(device=weight.device)


def resize_norm(norm: nn.Module, size: int) -> nn.Module:
    """A copy of a norm for another number of features. Its weights are 1."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    new = copy.copy(norm)
    new._parameters = {**norm._parameters, "weight": nn.Parameter(weight.new_ones(size))}
    return new


@torch.no_grad()
def copy_checked(target: Tensor, source: Tensor) -> None:
    """Copies `source` into a parameter and converts its dtype. Raises ValueError where shapes differ."""
    if target.shape != source.shape:
        raise ValueError(f"shapes differ: {tuple(target.shape)} and {tuple(source.shape)}")
    target.copy_(source)
