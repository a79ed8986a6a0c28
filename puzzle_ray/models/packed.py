"""Whether a parent reads each document of a packed sequence as if it stood alone (`data.document_mask`).

Whether a type does is a matter of what transformers does with its position ids, so it is tried out on a small model with random weights,
before any work. One thing none can do: rotary frequencies that depend on the longest row of a batch (longrope) would depend on the other
documents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from puzzle_ray.data.packing import SETTING, positions_in_documents
from puzzle_ray.errors import ConfigError
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.models.describe import describe, small_model
from puzzle_ray.models.rope import constant_up_to

if TYPE_CHECKING:
    from torch import Tensor

_OFF = f"write {SETTING}: false"
_TOLERANCE = 1e-4
_SEPARATOR, _TOKENS = 1, 24


def check_packed(config: Any, longest_row: int) -> None:
    """Raises ConfigError for a parent of this config whose rows of up to `longest_row` tokens cannot be read document by document."""
    descriptor, border = describe(config), constant_up_to(config)
    if border is not None and longest_row > border:
        problem = (
            f"{descriptor.model_type}'s rotary frequencies (longrope) depend on whether a batch has a document of more than {border} "
            f"tokens, and rows have up to {longest_row}"
        )
        raise ConfigError(SETTING, problem, f"{_OFF}, or rows of at most {border} tokens (data.sequence_length and others)")
    if problem := _differs(small_model(config), descriptor):
        raise ConfigError(SETTING, f"the parent's family {descriptor.model_type!r} {problem}", _OFF)


def _differs(model: Any, descriptor: Descriptor) -> str:
    """What a model does with packed documents other than with each alone, in words, or the empty string."""
    import torch

    from puzzle_ray.models.head import final_states

    ids = 2 + torch.arange(_TOKENS).remainder(model.config.vocab_size - 2).unsqueeze(0)
    ids[0, [_TOKENS // 3, _TOKENS // 2]] = _SEPARATOR
    cuts = [0, _TOKENS // 3, _TOKENS // 2, _TOKENS]
    position_ids = positions_in_documents(ids, _SEPARATOR)
    parts = [ids[:, a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    with torch.no_grad():
        whole, cut = final_states(model, ids, position_ids), _by_layers(model, descriptor, ids, position_ids)
        alone = torch.cat([final_states(model, part) for part in parts], dim=1)
    if not torch.allclose(whole, alone, atol=_TOLERANCE):
        return "lets tokens see other documents of their row, or keeps state from them"
    return "" if torch.allclose(cut, whole, atol=_TOLERANCE) else "cut into layers sees other documents of a row"


def _by_layers(model: Any, descriptor: Descriptor, ids: Tensor, position_ids: Tensor | None) -> Tensor:
    """The same hidden states, by a stack of layers."""
    from puzzle_ray.models.blocks import LayerStack

    stack = LayerStack(model, descriptor, model.config, 0, model.config.num_hidden_layers)
    hidden = stack.embed(ids, position_ids)
    for index in range(model.config.num_hidden_layers):
        hidden = stack.run_layer(stack.layer(index), index, hidden, position_ids=position_ids)
    return stack.final(hidden)
