"""What scoring holds in memory, and how much text is worked on at a time. Nothing here runs a model.

Text is scored in chunks of whole batches: the parent runs on one chunk, every replacement runs on that chunk, and then the parent's
activations and log-probabilities of the chunk are dropped. So memory does not grow with the text. How large chunks are changes no bit
of a score, because every batch is computed alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.models.blocks import stack_without_weights
from puzzle_ray.models.head import chunk_tokens
from puzzle_ray.models.masks import mask_bytes_per_token
from puzzle_ray.profiling.memory import weights_of
from puzzle_ray.scoring.settings import ScoringConfig

CPU_CHUNK_BYTES = 256 << 20  # of the parent's activations and log-probabilities, where `scoring.chunk_mib` is `auto`
GPU_CHUNK_SHARE = 0.4  # of what is free beside the weights
_FLOAT32_BYTES = 4
_STATES_IN_A_LAYER = 6  # hidden states that live at once in a layer: its input, the norm's output, queries, keys, values, a sum
_DRAWN_AT_ONCE = 2  # float32 tensors of the size of a batch's logits while labels are drawn, see `puzzle_ray.scoring.fisher`
_LOGITS_AT_ONCE = 5  # float32 tensors of the size of a chunk's logits while predictions are compared


@dataclass(frozen=True)
class Chunk:
    """Some batches of one round of reading; see `puzzle_ray.scoring.racing`."""

    round: int
    batches: tuple[int, ...]


def chunks_of_rounds(
    rounds: Sequence[tuple[int, ...]], batch_tokens: Sequence[int], bytes_per_token: int, limit_bytes: int
) -> list[Chunk]:
    """Runs of batches of one round that take at most `limit_bytes` together, or one batch that takes more."""
    return [
        Chunk(number, run)
        for number, batches in enumerate(rounds)
        for run in _runs(batches, batch_tokens, bytes_per_token, limit_bytes)
    ]


def _runs(
    batches: Sequence[int], batch_tokens: Sequence[int], bytes_per_token: int, limit_bytes: int
) -> Iterator[tuple[int, ...]]:
    run: list[int] = []
    held = 0
    for batch in batches:
        needed = batch_tokens[batch] * bytes_per_token
        if run and held + needed > limit_bytes:
            yield tuple(run)
            run, held = [], 0
        run.append(batch)
        held += needed
    if run:
        yield tuple(run)


def dtype_bytes(dtype: str) -> int:
    return _FLOAT32_BYTES if dtype == "float32" else 2


def kept_bytes_per_token(model_config: Any, layers: range, dtype: str) -> int:
    """What a shard with these layers keeps of the parent for each token of a chunk.

    That is the input of every layer and the output of the last one; with the end of the model also the output of the final norm, and
    log-probabilities in float32.
    """
    state = model_config.hidden_size * dtype_bytes(dtype)
    kept = (len(layers) + 1) * state
    if layers.stop == model_config.num_hidden_layers:
        kept += state + model_config.vocab_size * _FLOAT32_BYTES
    return kept


def chunk_limit_bytes(config: ScoringConfig, free_gpu_bytes: int | None) -> int:
    """What a chunk may take in a process; `free_gpu_bytes` is what its GPU has left, None without one."""
    if config.chunk_mib != "auto":
        return config.chunk_mib << 20
    return CPU_CHUNK_BYTES if free_gpu_bytes is None else int(GPU_CHUNK_SHARE * free_gpu_bytes)


@dataclass(frozen=True)
class ShardBytes:
    """What a process that scores with some layers of the parent holds, besides Python and its libraries."""

    weights: int
    kept: int  # the parent's activations and log-probabilities of one chunk
    candidates: int  # weights of the replacements of one pass, as they are read and as they compute
    working: int  # activations inside a layer, and a few tokens' logits

    @property
    def total(self) -> int:
        return self.weights + self.kept + self.candidates + self.working


def shard_bytes(
    model_config: Any,
    descriptor: Descriptor,
    layers: range,
    config: ScoringConfig,
    batch_tokens: int,
    free_gpu_bytes: int | None,
    masked_length: int = 0,
) -> ShardBytes:
    """For a shard on a CPU (`free_gpu_bytes` None) or a GPU, with text in batches of `batch_tokens` tokens.

    `masked_length` is the length of rows whose documents are masked, 0 where none are (see `puzzle_ray.models.masks`). Weights are counted
    on the real modules, without allocating them. A replacement counts as large as the largest layer.
    """
    dtype = getattr(torch, config.dtype)
    stack, _ = stack_without_weights(descriptor, model_config, layers.start, layers.stop, dtype)
    largest = max(weights_of(layer.parameters()).num_params for layer in stack.layers)
    each = kept_bytes_per_token(model_config, layers, config.dtype)
    kept = max(batch_tokens * each, chunk_limit_bytes(config, free_gpu_bytes))
    if config.downstream is None:  # else there are questions beside the text
        kept = min(kept, max(batch_tokens, config.tokens) * each)
    size = dtype_bytes(config.dtype)
    widest = max(parameter.shape[0] for layer in stack.layers for parameter in layer.parameters())
    each_token = (_STATES_IN_A_LAYER * model_config.hidden_size + 3 * widest) * size
    each_token += mask_bytes_per_token(model_config, masked_length, size)
    working = batch_tokens * config.candidate_batch * each_token
    if stack.head is not None:
        device = torch.device("cpu" if free_gpu_bytes is None else "cuda")
        tokens = min(chunk_tokens(model_config.vocab_size, device), batch_tokens)
        logits = _LOGITS_AT_ONCE * tokens
        if config.shortlist == "fisher":  # labels are drawn from a batch's whole probabilities, by noise of the same size
            logits = max(logits, _DRAWN_AT_ONCE * batch_tokens)
        working += logits * model_config.vocab_size * _FLOAT32_BYTES
    candidates = config.candidate_batch * largest * (size + _FLOAT32_BYTES)
    return ShardBytes(weights_of(stack.parameters()).weight_bytes, kept, candidates, working)
