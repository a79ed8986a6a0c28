"""What a layer remembers for its backward pass, counted on the real class by running it on tensors without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from puzzle_ray.families.registry import layer_type
from puzzle_ray.models.blocks import LayerStack, stack_without_weights
from puzzle_ray.models.describe import describe
from puzzle_ray.profiling.memory import weights_of

_TOKENS = 61  # of the sequence that is counted: no model has a dimension of this size


def remembered_bytes_per_token(stack: LayerStack, index: int) -> float:
    """Bytes that layer `index` keeps of every token, weights aside. `stack` has no data (device `meta`).

    Attention probabilities are not counted: the fused kernels of `sdpa` and flash attention do not keep them, though without data
    another kernel runs. What that kernel keeps in their place (queries, keys, values in float32) is about what the fused ones keep.
    """
    weights = {parameter.untyped_storage()._cdata for parameter in stack.parameters()}
    kept: dict[int, Tensor] = {}  # by storage, for several saved tensors may share one

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()._cdata
        if storage not in weights and saved.shape[-2:] != (_TOKENS, _TOKENS):
            kept[storage] = saved
        return saved

    shape = (1, _TOKENS, stack.config.hidden_size)
    hidden_states = torch.empty(shape, device="meta", dtype=stack.dtype, requires_grad=True)
    positions = torch.arange(_TOKENS, device="meta").unsqueeze(0)
    arguments: dict[str, Any] = {"attention_mask": None, "position_ids": positions, "use_cache": False}
    if stack.rotary is not None:
        of_type = {"layer_type": layer_type(stack.config, index)} if stack.descriptor.rotary_by_layer_type else {}
        arguments["position_embeddings"] = stack.rotary(hidden_states, position_ids=positions, **of_type)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        stack.run_layer(stack.layer(index), index, hidden_states, arguments)
    return sum(saved.untyped_storage().nbytes() for saved in kept.values()) / _TOKENS


def layers_remember(model_config: Any, dtype: torch.dtype) -> list[float]:
    """`remembered_bytes_per_token` of every layer, where it computes in `dtype`."""
    depth = model_config.num_hidden_layers
    stack, _ = stack_without_weights(describe(model_config), model_config, 0, depth, dtype)
    known, found = dict[tuple[str, int], float](), []
    for index in range(depth):
        kind = layer_type(stack.config, index), weights_of(stack.layer(index).parameters()).num_params
        if kind not in known:
            known[kind] = remembered_bytes_per_token(stack, index)
        found.append(known[kind])
    return found


def activation_bytes(model_config: Any, tokens: int, dtype: torch.dtype, recomputed: bool) -> int:
    """Bytes that all layers keep of a micro-batch of `tokens`.

    With `recomputed` (`gkd.activation_checkpointing`) layers keep their inputs, and one at a time keeps what it needs.
    """
    found = layers_remember(model_config, dtype)
    inputs = len(found) * model_config.hidden_size * dtype.itemsize
    return round(tokens * (max(found) + inputs if recomputed else sum(found)))
