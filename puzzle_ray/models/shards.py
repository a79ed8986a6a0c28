"""A model whose layers lie in shards, in this process or elsewhere: what no node holds whole is read as one model all the same.

A shard holds some layers of whichever model it was asked for last, the parent or any child, read from its folder. What is at the ends of
the model, embedding, final norm and head, is where the model is asked. Hidden states go from shard to shard in the model's own dtype, so
that where shards end changes no bit, and every layer runs as in `puzzle_ray.models.blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from puzzle_ray.models.blocks import CPU, LayerStack, load_ends, load_stack
from puzzle_ray.models.checkpoint import FLOATS, Checkpoint, locate
from puzzle_ray.models.child import read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.models.head import final_states
from puzzle_ray.process import give_back_freed_memory

Entering = tuple[Tensor, Tensor | None]  # hidden states `[batch, tokens, hidden_size]`, and position ids as of `LayerStack`


class Layers(Protocol):
    """All layers of one model, wherever they are."""

    def run(self, entering: Iterable[Entering]) -> Iterator[Tensor]:
        """The output of the last layer for each of several batches of hidden states, in order."""


def runs_of_layers(num_layers: int, num_shards: int) -> list[range]:
    """Consecutive layers in as many shards, whose numbers differ by at most one; no shard is without layers."""
    count = max(1, min(num_shards, num_layers))
    edges = [num_layers * n // count for n in range(count + 1)]
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def own_dtype(folder: Path, config: Any) -> torch.dtype:
    """The dtype that a folder's model is read in where nobody asks for another: its config's, else that of its first tensor."""
    said = config.dtype or FLOATS[next(iter(Checkpoint(folder).headers.values()))[0]]
    found: torch.dtype = getattr(torch, str(said).removeprefix("torch."))
    return found


class ModelShard:
    """Some layers of the model that was asked for last; those of another one take their place when they are asked for."""

    def __init__(self, layers: range, device: torch.device = CPU) -> None:
        self.layers, self.device = layers, device
        self.held: tuple[str, torch.dtype] | None = None
        self.stack: LayerStack | None = None

    def load(self, folder: str, dtype: torch.dtype) -> LayerStack:
        """These layers of a folder's model, read file by file unless they are there."""
        if self.stack is None or self.held != (folder, dtype):
            self.drop()
            path = locate(folder)
            config = read_config(path)
            first, last = self.layers.start, self.layers.stop
            self.stack = load_stack(path, describe(config), config, first, last, dtype, ends=False, device=self.device)
            self.held = (folder, dtype)
        return self.stack

    def drop(self) -> None:
        """Holds nothing from here on."""
        self.stack = self.held = None
        give_back_freed_memory()

    @torch.inference_mode()
    def run(self, folder: str, dtype: torch.dtype, hidden: Tensor, position_ids: Tensor | None) -> Tensor:
        """The output of the shard's last layer, on its device."""
        stack = self.load(folder, dtype)
        hidden = hidden.to(self.device)
        known = None if position_ids is None else position_ids.to(self.device)
        for index in self.layers:
            hidden = stack.run_layer(stack.layer(index), index, hidden, position_ids=known)
        return hidden


class SerialLayers:
    """In this process, one shard after the other: all batches go through one before the next is read, and wait in the host's memory."""

    def __init__(self, folder: str, dtype: torch.dtype, num_shards: int, num_layers: int, device: torch.device = CPU) -> None:
        self.folder, self.dtype = folder, dtype
        self.shards = [ModelShard(layers, device) for layers in runs_of_layers(num_layers, num_shards)]

    def run(self, entering: Iterable[Entering]) -> Iterator[Tensor]:
        states = [(hidden.to(CPU), known) for hidden, known in entering]
        for shard in self.shards:
            for number, (hidden, known) in enumerate(states):
                states[number] = (shard.run(self.folder, self.dtype, hidden, known).to(CPU), known)
            if len(self.shards) > 1:
                shard.drop()
        for hidden, _ in states:
            yield hidden


LayersOf = Callable[[str, torch.dtype, int], Layers]  # of a folder's model, in a dtype, so many layers


def in_this_process(num_shards: int, device: torch.device = CPU) -> LayersOf:
    """Models in so many shards, of which one is in memory at a time."""
    return lambda folder, dtype, num_layers: SerialLayers(folder, dtype, num_shards, num_layers, device)


class _Body:
    """In place of the forward of a model without its head: embedding, layers wherever they are, final norm.

    It knows nothing of the model that it is a part of, so that a model goes when nobody has it any more.
    """

    def __init__(self, stack: LayerStack, layers: Layers, device: torch.device) -> None:
        self.stack, self.layers, self.device = stack, layers, device

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None = None, **_: Any) -> Any:
        """Rows have no padding before their tokens, and position ids say all that a mask would."""
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as Output

        (final,) = self.final_states([input_ids], [position_ids])
        return Output(last_hidden_state=final)

    def final_states(self, batches: Sequence[Tensor], position_ids: Sequence[Tensor | None]) -> Iterator[Tensor]:
        pairs = zip(batches, position_ids, strict=True)
        for hidden in self.layers.run((self.stack.embed(ids, known), known) for ids, known in pairs):
            yield self.stack.final(hidden.to(self.device))


class ShardedModel:
    """A causal language model whose layers lie in shards.

    `ends` is the model of transformers without its layers: its embedding, final norm and head, and what it generates by. Between them
    hidden states go through the layers. There is no KV cache: every generated token reads the whole text before it again.
    """

    def __init__(self, folder: str, layers_of: LayersOf, dtype: torch.dtype | None = None, device: torch.device = CPU) -> None:
        path = locate(folder)
        config = read_config(path)
        descriptor = describe(config)
        self.dtype, self.device = dtype or own_dtype(path, config), device
        layers = layers_of(folder, self.dtype, config.num_hidden_layers)
        stack, self.ends = load_ends(path, descriptor, config, self.dtype, device)
        self.body, self.config = _Body(stack, layers, device), self.ends.config
        where, _, name = descriptor.layers.rpartition(".")
        holder = self.ends.get_submodule(where)
        setattr(holder, name, nn.ModuleList())
        holder.forward = self.body
        self.ends.generation_config = generation_config_of(path)
        self.ends.eval()

    def final_states(self, batches: Sequence[Tensor], position_ids: Sequence[Tensor | None]) -> Iterator[Tensor]:
        """The outputs of the final norm, one after the other. Shards work on several batches at a time."""
        return self.body.final_states(batches, position_ids)

    def __call__(self, input_ids: Tensor, **known: Any) -> Any:
        return self.ends(input_ids, **known)

    def generate(self, input_ids: Tensor, **known: Any) -> Any:
        return self.ends.generate(input_ids, use_cache=False, **known)

    @property
    def generation_config(self) -> Any:
        return self.ends.generation_config

    @property
    def base_model(self) -> Any:
        return self.ends.base_model

    def get_submodule(self, name: str) -> nn.Module:
        """Of what is at the ends."""
        found: nn.Module = self.ends.get_submodule(name)
        return found


def generation_config_of(folder: Path) -> Any:
    """What a folder says of how its model generates, as transformers reads it with the model."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:  # the folder has no such file
        return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


def states_of_batches(model: Any, batches: Sequence[Tensor], position_ids: Sequence[Tensor | None]) -> Iterator[Tensor]:
    """`final_states` of several batches of a causal language model, whole or in shards, one after the other."""
    if isinstance(model, ShardedModel):
        yield from model.final_states(batches, position_ids)
        return
    for ids, known in zip(batches, position_ids, strict=True):
        yield final_states(model, ids, known)
