"""The modules that replace an attention or an FFN. They accept the arguments that transformers passes to the original ones.

A layer without attention still writes to the KV cache: a stub of zeros, `[batch, 1, tokens, 1]`. Transformers reads the length of a
sequence from the cache of the first layer. If that layer never wrote there, positions would be wrong without any error.

vLLM runs children by their own forward. It finds the attention of every layer by the one call of an attention function in a module's
source, and gives it a KV cache. So a layer without attention has such a call, which never runs, and its smallest cache stays empty.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as _INTERFACE
from transformers.pytorch_utils import Conv1D

from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.surgery.kv_cache import NAME, add_to_cache, cache_among
from puzzle_ray.surgery.window import check_windows, windowed_mask


class _ByName:
    """Transformers 4's table of attention functions, with the method that it has in transformers 5."""

    def get_interface(self, name: str, default: Any) -> Any:
        return default if name == "eager" else _INTERFACE[name]


ALL_ATTENTION_FUNCTIONS: Any = _INTERFACE if hasattr(_INTERFACE, "get_interface") else _ByName()


def _count_tokens(arguments: dict[str, Any], layer_idx: int, hidden_states: Tensor) -> None:
    cache = cache_among(arguments)
    if cache is not None:
        stub = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
        add_to_cache(cache, stub, stub, layer_idx, arguments)


class NoopAttention(nn.Module):
    """Adds nothing to the residual stream."""

    is_causal = True

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx

    def forward(self, hidden_states: Tensor, **arguments: Any) -> tuple[Tensor, None]:
        if self.layer_idx < 0:  # never: see above
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
            return attend(self, hidden_states, hidden_states, hidden_states, None)
        _count_tokens(arguments, self.layer_idx, hidden_states)
        return hidden_states.new_zeros(()), None


class LinearAttention(nn.Module):
    """One `[hidden_size, hidden_size]` matrix on each token, with no attention to other tokens."""

    is_causal = True

    def __init__(self, config: Any, layer_idx: int, bias: bool = False) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.linear_attn = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)

    def forward(self, hidden_states: Tensor, **arguments: Any) -> tuple[Tensor, None]:
        if self.layer_idx < 0:  # never: see above
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
            return attend(self, hidden_states, hidden_states, hidden_states, None)
        _count_tokens(arguments, self.layer_idx, hidden_states)
        return self.linear_attn(hidden_states), None


class NoopFFN(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.new_zeros(())


class LinearFFN(nn.Module):
    """One `[hidden_size, hidden_size]` matrix."""

    def __init__(self, hidden_size: int, bias: bool = False) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = self.linear_mlp(hidden_states)
        return out


class OutputConv1D(Conv1D):
    """The output projection of an attention that joins heads and channels whatever they are (GPT-2's own forward).

    vLLM's attention function gives `[tokens, hidden_size]`, with heads and channels joined already. Such a forward then joins tokens
    and channels, to one axis. Here they are parted again.
    """

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x.view(1, -1, self.nx) if x.dim() == 1 else x)
        return out


def part_joined_tokens(layer: nn.Module, descriptor: Descriptor) -> None:
    """Makes an attention's output projection take what vLLM gives, in place. Does nothing for families that need no such care."""
    output = getattr(layer.get_submodule(descriptor.attention), descriptor.output, None)
    if isinstance(output, Conv1D):
        output.__class__ = OutputConv1D


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Eager attention with an additive mask; scores are in float32.

    Queries are `[batch, heads, tokens, head_dim]`; keys and values are `[batch, kv_heads, keys, head_dim]`. Returns the output,
    `[batch, tokens, heads, head_dim]`, and the attention weights, `[batch, heads, tokens, keys]`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query.float() @ key.float().transpose(2, 3) * scaling
    if mask is not None:
        scores = scores + mask
    weights = nn.functional.dropout(scores.softmax(dim=-1).to(value.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


def _scaling(attention: Any, head_dim: int, layer_index: int) -> float:
    """By what an attention multiplies its scores."""
    scaling = getattr(attention, "scaling", None)
    if scaling is not None:
        return float(scaling)
    if not getattr(attention, "scale_attn_weights", False):  # GPT-Neo does not scale
        return 1.0
    by_layer = getattr(attention, "scale_attn_by_inverse_layer_idx", False)  # GPT-2 in transformers 4
    return float(head_dim**-0.5 / (layer_index + 1 if by_layer else 1))


def _attention_dropout(attention: Any) -> float:
    """The share of its weights that an attention drops in training."""
    if isinstance(attention, GroupedAttention):
        return attention.attention_dropout
    module = getattr(attention, "attn_dropout", None)  # GPT-2, GPT-Neo
    return float(attention.config.attention_dropout if module is None else module.p)


class GroupedAttention(nn.Module):
    """Attention whose query heads share KV heads, without rotary embedding.

    It is for families whose own forward has the same number of query and KV heads: OPT, GPT-Neo, and GPT-2 with eager attention. It has
    the projections of the attention that it replaces, under the same names. `key_value_groups` query heads share each KV head.
    """

    def __init__(self, replaced: nn.Module, descriptor: Descriptor, key_value_groups: int) -> None:
        super().__init__()
        self.training = replaced.training
        config: Any = replaced.config  # the model makes its masks from the same config object
        self.config, self.descriptor, self.is_causal = config, descriptor, True
        self.layer_idx: int = getattr(replaced, descriptor.layer_index)
        setattr(self, descriptor.layer_index, self.layer_idx)
        self.head_dim: int = replaced.head_dim  # type: ignore[assignment]
        self.num_key_value_groups = key_value_groups
        self.scaling = _scaling(replaced, self.head_dim, self.layer_idx)
        kinds = getattr(config, "attention_layers", None)  # GPT-Neo's
        self.window: int | None = config.window_size if kinds and kinds[self.layer_idx] == "local" else None
        if self.window is not None:
            check_windows(config)
        self.attention_dropout = _attention_dropout(replaced)
        self.resid_dropout = getattr(replaced, "resid_dropout", nn.Identity())
        separate = (descriptor.query, descriptor.key, descriptor.value)
        for name in (*((descriptor.fused_qkv,) if descriptor.fused_qkv else separate), descriptor.output):
            setattr(self, name, getattr(replaced, name))

    def _projected(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, `[batch, tokens, channels]`."""
        named = self.descriptor
        if not named.fused_qkv:
            return tuple(getattr(self, name)(hidden_states) for name in (named.query, named.key, named.value))
        fused: Tensor = getattr(self, named.fused_qkv)(hidden_states)
        groups, heads = self.num_key_value_groups, fused.shape[-1] // self.head_dim
        keys = heads // (groups + 2) * self.head_dim
        return fused.split((groups * keys, keys, keys), dim=-1)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **arguments: Any
    ) -> tuple[Tensor, Tensor | None]:
        batch, tokens, _ = hidden_states.shape

        query, key, value = (
            projected.view(batch, tokens, -1, self.head_dim).transpose(1, 2) for projected in self._projected(hidden_states)
        )
        cache = cache_among(arguments)
        if cache is not None:
            key, value = add_to_cache(cache, key, value, self.layer_idx, arguments)
        if attention_mask is not None:
            attention_mask = attention_mask[..., : key.shape[2]]  # GPT-Neo's in transformers 4 has a column too many
        if self.window is not None:
            eager, keys = check_windows(self.config) == "eager", key.shape[2]
            attention_mask = windowed_mask(attention_mask, self.window, tokens, keys, keys - tokens, hidden_states, eager)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        more = {name: value for name, value in arguments.items() if name not in (NAME, "layer_past", "cache_position")}
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **more)
        return self.resid_dropout(getattr(self, self.descriptor.output)(out.reshape(batch, tokens, -1))), weights
