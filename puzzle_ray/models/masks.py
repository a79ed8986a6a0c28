"""Attention that does not cross documents (`data.document_mask`): what a whole model is told, and what its masks take in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from puzzle_ray.families.registry import descriptor_of, num_kv_heads

_BOOLEANS = 2  # the mask, and what it is made of: which tokens are before which, and of the same document


def packed_arguments(model: Any, input_ids: Tensor, position_ids: Tensor | None) -> dict[str, Any]:
    """What the forward of a whole model takes beside token ids; `position_ids` are as of `puzzle_ray.models.blocks.LayerStack`.

    Most models of transformers make their masks from position ids. Where one does not, the mask is made here, in the same way.
    """
    if position_ids is None:
        return {}
    if descriptor_of(model.config).masks_by_positions:
        return {"position_ids": position_ids}
    like = torch.empty((*input_ids.shape, 1), dtype=model.dtype, device=input_ids.device)
    return {"position_ids": position_ids, "attention_mask": create_causal_mask(model.config, like, None, None, position_ids)}


def mask_bytes_per_token(config: Any, length: int, dtype_bytes: int, layers: int = 1) -> int:
    """What the mask costs for each token of rows of `length` tokens, where as many layers are kept; 0 for rows of length 0.

    A row of booleans, and in every layer the same in the dtype of its scores, which fused attention makes and keeps for its backward
    pass. Beside a mask, transformers repeats keys and values for the query heads that share them.
    """
    if not length:
        return 0
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    repeated = 2 * (heads - num_kv_heads(config)) * head_dim
    return length * _BOOLEANS + layers * dtype_bytes * (length + repeated)
