"""Bytes of what a forward pass keeps for the backward pass, by the products of the real classes; and of masks."""

from __future__ import annotations

from typing import Any

from torch import nn

from puzzle_ray.config import RunConfig
from puzzle_ray.distill.settings import AUTO, GkdConfig
from puzzle_ray.models.masks import mask_bytes_per_token

_NORMS_BYTES = 16  # of each element of a hidden state: norms compute in float32, whatever the dtype around them


def kept_bytes_per_token(layer: nn.Module, hidden_size: int, dtype_bytes: int) -> int:
    """What one decoder layer keeps for each token.

    Every product keeps its input, and what stands behind it (a rotation, an activation function, a gate) keeps its output: twice the
    outputs of all products. Attention is counted without the matrix of its weights, which no fused kernel keeps. A test compares this
    with what autograd keeps.
    """
    outputs = sum(parameter.shape[0] for parameter in layer.parameters() if parameter.dim() == 2)
    return 2 * outputs * dtype_bytes + _NORMS_BYTES * hidden_size


def computes_in_half(gkd: GkdConfig, parent_dtype: str) -> bool:
    """Whether a child computes in bfloat16, by what `gkd.compute_dtype` says of workers whose parent is in this dtype."""
    return (gkd.use_gpu and parent_dtype != "float32") if gkd.compute_dtype == AUTO else gkd.compute_dtype == "bfloat16"


def masks_of(
    config: RunConfig, model_config: Any, tokens: int, dtype_bytes: int, layers: int = 1, length: int = 0
) -> dict[str, int]:
    """The part `attention masks` of a pass over so many tokens that keeps those of `layers` layers; none without `data.document_mask`.

    Rows are of `length` tokens, by default of `data.sequence_length`.
    """
    if not config.data.document_mask:
        return {}
    length = length or config.data.sequence_length
    return {"attention masks": tokens * mask_bytes_per_token(model_config, length, dtype_bytes, layers)}
