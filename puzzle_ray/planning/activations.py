"""Bytes of what a forward pass keeps for the backward pass, by the products of the real classes."""

from __future__ import annotations

from torch import nn

_NORMS_BYTES = 16  # of each element of a hidden state: norms compute in float32, whatever the dtype around them


def kept_bytes_per_token(layer: nn.Module, hidden_size: int, dtype_bytes: int) -> int:
    """What one decoder layer keeps for each token.

    Every product keeps its input, and what stands behind it (a rotation, an activation function, a gate) keeps its output: twice the
    outputs of all products. Attention is counted without the matrix of its weights, which no fused kernel keeps. A test compares this
    with what autograd keeps.
    """
    outputs = sum(parameter.shape[0] for parameter in layer.parameters() if parameter.dim() == 2)
    return 2 * outputs * dtype_bytes + _NORMS_BYTES * hidden_size
