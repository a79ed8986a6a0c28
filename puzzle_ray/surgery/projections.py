"""A layer's projections, the same for every family: as `[out, in]` weights, whether fused, transposed or neither."""

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
    """Views of a projection's parameters: what is written here is written into the module."""

    weight_OI: Tensor
    bias_O: Tensor | None

    @classmethod
    def of(cls, linear: nn.Module) -> Projection:
        weight: Tensor = linear.weight.detach()  # type: ignore[operator]
        bias: Tensor | None = linear.bias  # type: ignore[assignment]
        return cls(weight.T if isinstance(linear, Conv1D) else weight, None if bias is None else bias.detach())

    def split(self, lengths: tuple[int, ...]) -> tuple[Projection, ...]:
        """Rows of a fused projection, one after the other."""
        weights = self.weight_OI.split(lengths)
        biases = [None] * len(lengths) if self.bias_O is None else self.bias_O.split(lengths)
        return tuple(Projection(w, b) for w, b in zip(weights, biases, strict=True))

    def write(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        copy_(self.weight_OI, weight_OI)
        if self.bias_O is not None and bias_O is not None:
            copy_(self.bias_O, bias_O)

    def write_rows(self, source: Projection, rows: Tensor) -> None:
        self.write(source.weight_OI[rows], None if source.bias_O is None else source.bias_O[rows])


@dataclass(frozen=True)
class AttentionProjections:
    """Query, key, value and output of an attention: `[heads * head_dim, hidden_size]`, the output the other way round."""

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
    def num_heads(self) -> int:
        return self.query.weight_OI.shape[0] // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        return self.key.weight_OI.shape[0] // self.head_dim


@dataclass(frozen=True)
class FFNProjections:
    """`inner` are `[channels, hidden_size]` (gate, if there is one, and up), `down` is `[hidden_size, channels]`."""

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

    def keep(self, parent: FFNProjections, channels: Tensor) -> None:
        """Takes over some channels of a wider FFN."""
        for target, source in zip(self.inner, parent.inner, strict=True):
            target.write_rows(source, channels)
        self.down.write(parent.down.weight_OI[:, channels], parent.down.bias_O)


def resize_attention(layer: nn.Module, num_kv_heads: int, descriptor: Descriptor) -> None:
    """Shape-only: an attention of `num_kv_heads`, in place. What changed size, and a whole fused projection, is undefined."""
    core = descriptor.core(layer, "attention")
    old = AttentionProjections.of(layer, descriptor)
    queries, keys = old.query.weight_OI.shape[0], num_kv_heads * old.head_dim
    if descriptor.fused_qkv:
        fused = getattr(core, descriptor.fused_qkv)
        setattr(core, descriptor.fused_qkv, resize_linear(fused, sizes(fused)[0], queries + 2 * keys))
        core.num_key_value_heads = num_kv_heads  # type: ignore[assignment]
        core.split_size = [queries, keys, keys]  # type: ignore[assignment]
    else:
        for name in (descriptor.key, descriptor.value):
            linear = getattr(core, name)
            setattr(core, name, resize_linear(linear, sizes(linear)[0], keys))
    for name in descriptor.key_norms:
        setattr(core, name, resize_norm(getattr(core, name), keys))
    core.num_key_value_groups = old.num_heads // num_kv_heads  # type: ignore[assignment]
    if not descriptor.grouped_heads:
        grouped = GroupedAttention(core, descriptor, old.num_heads // num_kv_heads)
        layer.set_submodule(".".join(name for name in (descriptor.attention, descriptor.attention_core) if name), grouped)


def resize_ffn(layer: nn.Module, width: int, descriptor: Descriptor) -> None:
    """Shape-only: an FFN of `width` channels, in place; its weights are undefined."""
    core = descriptor.core(layer, "ffn")
    inner = (descriptor.fused_gate_up,) if descriptor.fused_gate_up else (descriptor.ffn_gate, descriptor.ffn_up)
    for name in filter(None, inner):
        linear = getattr(core, name)
        setattr(core, name, resize_linear(linear, sizes(linear)[0], width * (2 if descriptor.fused_gate_up else 1)))
    down = getattr(core, descriptor.ffn_down)
    setattr(core, descriptor.ffn_down, resize_linear(down, width, sizes(down)[1]))
    if hasattr(core, "intermediate_size"):
        core.intermediate_size = width  # type: ignore[assignment]


def sizes(linear: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a Linear or a Conv1D."""
    if isinstance(linear, Conv1D):
        return int(linear.nx), int(linear.nf)
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features


def resize_linear(linear: nn.Module, in_features: int, out_features: int) -> nn.Module:
    """An uninitialised Linear or Conv1D of another size, with the same dtype, device and presence of a bias."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    with torch.device("meta"):
        if isinstance(linear, Conv1D):
            new: nn.Module = Conv1D(out_features, in_features)
        else:
            new = nn.Linear(in_features, out_features, bias=linear.bias is not None)
    return new.to(weight.dtype).to_empty(device=weight.device)


def resize_norm(norm: nn.Module, size: int) -> nn.Module:
    """A copy of a norm over another number of features, its weights one."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    new = copy.copy(norm)
    new._parameters = {**norm._parameters, "weight": nn.Parameter(weight.new_ones(size))}
    return new


@torch.no_grad()
def copy_(target: Tensor, source: Tensor) -> None:
    """Writes `source` into a parameter, whatever its dtype; shapes must agree exactly."""
    if target.shape != source.shape:
        raise ValueError(f"shapes differ: {tuple(target.shape)} and {tuple(source.shape)}")
    target.copy_(source)
