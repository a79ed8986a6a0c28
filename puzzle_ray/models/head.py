"""From final hidden states to logits, a few tokens at a time: with a vocabulary of 150,000, whole logits are the largest tensor of all."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from puzzle_ray.families.registry import descriptor_of
from puzzle_ray.models.masks import packed_arguments
from puzzle_ray.process import give_back_freed_memory

# N tokens of a chunk, V vocabulary
_FREED = 1.0  # of what is in use: freed memory up to this share goes back before a chunk's logits
CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}  # logits that exist at a time; a chunk on a GPU must keep it busy


def chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """How many tokens' logits are computed at a time. It is a function of the vocabulary and the kind of device alone."""
    return max(1, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"]) // vocab_size)


def chunks_of(tokens: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    """Consecutive runs of tokens."""
    size = chunk_tokens(vocab_size, device)
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


@dataclass(frozen=True)
class Head:
    """What stands behind the final norm: the head, then the family's divisor, then its soft cap."""

    linear: nn.Module
    divisor: float | None = None
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a causal language model of transformers."""
        descriptor, config = descriptor_of(model.config), model.config
        divisor = getattr(config, descriptor.logits_divisor) if descriptor.logits_divisor else None
        softcap = getattr(config, descriptor.logits_softcap) if descriptor.logits_softcap else None
        return cls(model.get_submodule(descriptor.head), divisor, softcap)

    def alone(self) -> Head:
        """The same in memory of its own. On a CPU, a weight that was read from a file keeps the whole mapped file in memory."""
        weight = self.linear.weight
        assert isinstance(weight, Tensor)
        return replace(self, linear=copy.deepcopy(self.linear)) if weight.device.type == "cpu" else self

    @property
    def vocab_size(self) -> int:
        weight = self.linear.weight
        assert isinstance(weight, Tensor)
        return weight.shape[0]

    def logits(self, final: Tensor) -> Tensor:
        """The logits of outputs of the final norm, `[..., hidden_size]` -> `[..., vocab_size]`."""
        logits: Tensor = self.linear(final)
        if self.divisor is not None:
            logits = logits / self.divisor
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def chunks(self, final: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The same for `[batch, tokens, hidden_size]`, flattened to one row per token: (which tokens, `logits_NV`)."""
        flat = final.flatten(0, 1)
        for part in chunks_of(len(flat), self.vocab_size, flat.device):
            give_back_freed_memory(_FREED)  # other threads allocate in the gaps that logits left, and the next ones do not fit
            yield part, self.logits(flat[part])

    @torch.no_grad()
    def log_probs(self, final: Tensor) -> Tensor:
        """Log-probabilities in float32, `[batch, tokens, hidden_size]` -> `[batch, tokens, vocab_size]`. Only these are whole."""
        out = torch.empty(*final.shape[:-1], self.vocab_size, dtype=torch.float32, device=final.device)
        flat = out.flatten(0, 1)
        for part, logits_NV in self.chunks(final):
            flat[part] = logits_NV.float().log_softmax(-1)
        return out


def final_states(model: Any, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """The output of a causal language model's final norm, `[batch, tokens, hidden_size]`. No logits are computed.

    `position_ids` are as of `puzzle_ray.models.blocks.LayerStack`.
    """
    known = packed_arguments(model, input_ids, position_ids)
    states: Tensor = model.base_model(input_ids, use_cache=False, **known).last_hidden_state
    return states
