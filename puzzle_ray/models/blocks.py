"""Layers whose attention and FFN can be replaced, and consecutive layers that run without the rest of the model.

Every forward here is the family's own code in transformers. The attention half of a layer is the layer with a no-op FFN, and its FFN
half is the layer with a no-op attention. So the same forward is trained, scored, profiled and served.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from puzzle_ray.artifacts import KINDS, NOOP, PARENT, LayerChoice, SubblockKind
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.families.registry import layer_type
from puzzle_ray.models.checkpoint import Checkpoint, as_stored
from puzzle_ray.models.child_classes import child_classes
from puzzle_ray.models.head import Head
from puzzle_ray.variants.base import reshape_layer

CPU = torch.device("cpu")


def subblock_state(layer: nn.Module, kind: SubblockKind, descriptor: Descriptor) -> dict[str, Tensor]:
    """The weights of one subblock and of its norms, by their names inside the layer. They are live tensors, not copies."""
    prefixes = descriptor.prefixes(kind)
    return {name: value for name, value in layer.state_dict().items() if name.startswith(prefixes)}


def load_subblock(layer: nn.Module, kind: SubblockKind, descriptor: Descriptor, state: Mapping[str, Tensor]) -> None:
    """Copies a subblock's weights into a layer of the same shape. Raises ValueError where names or shapes differ."""
    own = subblock_state(layer, kind, descriptor)
    if own.keys() != state.keys():
        raise ValueError(f"{kind}: expected {sorted(own)}, got {sorted(state)}")
    with torch.no_grad():
        for name, value in state.items():
            if own[name].shape != value.shape:
                raise ValueError(f"{kind}: {name} is {tuple(value.shape)}, expected {tuple(own[name].shape)}")
            own[name].copy_(value)


def swapped(
    layer: nn.Module,
    choice: LayerChoice,
    descriptor: Descriptor,
    config: Any,
    states: Mapping[SubblockKind, Mapping[str, Tensor]] | None = None,
) -> nn.Module:
    """A new layer with some subblocks replaced. The subblocks that stay the parent's are shared with `layer`, not copied.

    `states` has the weights of the replaced subblocks, by their names inside the layer. Without it those weights are undefined.
    """
    memo: dict[int, Any] = {}
    for kind in KINDS:
        if choice.variant(kind) in (PARENT, NOOP):  # what is removed need not be copied before
            for name in (descriptor.module(kind), *descriptor.norms(kind)):
                module = layer.get_submodule(name)
                memo[id(module)] = module
    child = copy.deepcopy(layer, memo)
    reshape_layer(child, choice, descriptor, config)
    child.train(layer.training)  # new modules begin in training mode, in which some drop out what they compute
    for kind, state in (states or {}).items():
        load_subblock(child, kind, descriptor, state)
    return child


class LayerStack(nn.Module):
    """Layers `first` to `last` (exclusive) of a parent.

    Where `first` is 0 it has the embedding too, and where `last` is the end of the model it has the final norm and the head. With
    `ends=False` it has layers only. `hidden_states` are `[batch, tokens, hidden_size]`, of sequences without padding. `own_dtype` is the
    one that the parent is stored in, where that is known.

    `position_ids`, `[batch, tokens]`, say where the documents of packed sequences begin: positions start anew there, and a token attends
    to its own document alone (see `puzzle_ray.data.packing`). Without them every row is one document.
    """

    own_dtype: torch.dtype | None = None

    def __init__(
        self, model: nn.Module, descriptor: Descriptor, config: Any, first: int, last: int, *, ends: bool = True
    ) -> None:
        super().__init__()
        self.descriptor, self.config, self.first, self.last = descriptor, config, first, last
        layers = model.get_submodule(descriptor.layers)
        assert isinstance(layers, nn.ModuleList)
        self.layers = layers[first:last]
        self.rotary = model.get_submodule(descriptor.rotary) if descriptor.rotary else None
        starts, stops = ends and first == 0, ends and last == config.num_hidden_layers
        self.embedding = model.get_submodule(descriptor.embedding) if starts else None
        self.positions = model.get_submodule(descriptor.positions) if starts and descriptor.positions else None
        self.final_norm = model.get_submodule(descriptor.final_norm) if stops else None
        self.head = model.get_submodule(descriptor.head) if stops else None
        self.divisor = getattr(config, descriptor.logits_divisor) if descriptor.logits_divisor else None
        self.softcap = getattr(config, descriptor.logits_softcap) if descriptor.logits_softcap else None

    @property
    def device(self) -> torch.device:
        """The device of the weights. Inputs must be on it."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which the layers compute."""
        return next(self.parameters()).dtype

    def embed(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """The input of layer 0, with learned positions and multiplier: `[batch, tokens]` -> `[batch, tokens, hidden_size]`."""
        assert self.embedding is not None, "this stack does not hold the embedding"
        out: Tensor = self.embedding(input_ids)
        if self.positions is not None:
            assert isinstance(self.positions, nn.Embedding)
            offset = getattr(self.positions, "offset", 0)  # in OPT, position 0 has row 2
            positions = _counted(input_ids) if position_ids is None else position_ids
            out = out + nn.functional.embedding(positions + offset, self.positions.weight)
        multiplier = self.descriptor.embedding_multiplier
        return out * getattr(self.config, multiplier) if multiplier else out

    def layer_arguments(self, hidden_states: Tensor, index: int, position_ids: Tensor | None = None) -> dict[str, Any]:
        """The arguments that the family's model passes to layer `index` besides the hidden states."""
        position_ids = _counted(hidden_states) if position_ids is None else position_ids
        sliding = layer_type(self.config, index) == "sliding_attention" or (
            getattr(self.config, "layer_types", None) is None and getattr(self.config, "sliding_window", None) is not None
        )
        make_mask = create_sliding_window_causal_mask if sliding else create_causal_mask
        # Mask and cache are passed by position, because the name of the cache differs between versions of transformers. Where position
        # ids start anew, transformers masks what is before: it takes the row for several sequences.
        mask = make_mask(self.config, hidden_states, None, None, position_ids=position_ids)
        arguments: dict[str, Any] = {"attention_mask": mask, "position_ids": position_ids, "use_cache": False}
        if self.rotary is not None:
            by_type = {"layer_type": layer_type(self.config, index)} if self.descriptor.rotary_by_layer_type else {}
            arguments["position_embeddings"] = self.rotary(hidden_states, position_ids=position_ids, **by_type)
        return arguments

    def run_layer(
        self,
        layer: nn.Module,
        index: int,
        hidden_states: Tensor,
        arguments: dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The output of a layer, `[batch, tokens, hidden_size]`. `layer` is layer `index` of the stack or one that replaces it.

        `arguments` are those of `layer_arguments`, where the caller has them already.
        """
        out = layer(hidden_states, **(arguments or self.layer_arguments(hidden_states, index, position_ids)))
        return out[0] if isinstance(out, tuple) else out

    def layer(self, index: int) -> nn.Module:
        """Layer `index`, counted in the whole model."""
        return self.layers[index - self.first]

    def predict(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states and logits of what leaves the last layer, `[batch, tokens, hidden_size]` and `[batch, tokens, vocab_size]`.

        Final norm, then head, then the family's divisor, then its soft cap: bit for bit the logits of the whole model.
        """
        final = self.final(hidden_states)
        return final, self.output_head.logits(final)

    def final(self, hidden_states: Tensor) -> Tensor:
        """The first half of `predict`: the output of the final norm."""
        assert self.final_norm is not None, "this stack does not hold the final norm"
        out: Tensor = self.final_norm(hidden_states)
        return out

    @property
    def output_head(self) -> Head:
        """What makes logits of the final norm's output, whole or a few tokens at a time."""
        assert self.head is not None, "this stack does not hold the head"
        return Head(self.head, self.divisor, self.softcap)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """The second half of `predict`."""
        return self.predict(hidden_states)[1]

    def logit_slopes(self, hidden_states: Tensor) -> Tensor | None:
        """How much each logit moves with the head's output for it, `[batch, tokens, vocab_size]`; None where both are the same."""
        if self.divisor is None and self.softcap is None:
            return None
        logits = self.logits(hidden_states).float()
        slopes = torch.ones_like(logits) if self.softcap is None else 1 - (logits / self.softcap).square()
        return slopes if self.divisor is None else slopes / self.divisor


def _counted(states: Tensor) -> Tensor:
    """Position ids of rows that are one document each, `[1, tokens]`."""
    return torch.arange(states.shape[1], device=states.device).unsqueeze(0)


def _materialise(
    module: nn.Module, prefix: str, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, model: Any
) -> None:
    """Allocates a module of `model` that was built on the meta device, and fills it from tensors named `prefix.*`."""
    names = {f"{prefix}.{name}": name for name in module.state_dict()}
    module.to_empty(device=device)
    for parameter in module.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    for part in module.modules():  # fills the buffers, which no checkpoint has
        model._init_weights(part)
    own = module.state_dict()
    for full_name, value in checkpoint.read(names):
        own[names[full_name]].copy_(value.to(dtype))


def model_class_of(config: Any, descriptor: Descriptor) -> Any:
    """The class that builds the model of a config: the family's own, or that of its children."""
    is_child = str(config.model_type).startswith("puzzle_")
    return child_classes(descriptor.model_type)[1] if is_child else getattr(transformers, descriptor.model_class)


def stack_without_weights(
    descriptor: Descriptor,
    config: Any,
    first: int,
    last: int,
    dtype: torch.dtype,
    *,
    ends: bool = True,
) -> tuple[LayerStack, Any]:
    """A stack whose weights have shapes and dtypes only (device meta), and the whole model that it is a part of."""
    own_dtype, config = getattr(config, "dtype", None), copy.deepcopy(config)
    config._attn_implementation = descriptor.attn_implementation
    with torch.device("meta"):
        model = model_class_of(config, descriptor)._from_config(config, dtype=dtype)
    stack = LayerStack(model, descriptor, config, first, last, ends=ends)
    stack.own_dtype = own_dtype
    return stack, model


def _fill(stack: LayerStack, model: Any, layers: range, checkpoint: Checkpoint, device: torch.device) -> None:
    """Reads some layers of a stack without weights, and its embedding, norm and head, tensor by tensor, straight to `device`."""
    descriptor, config, dtype = stack.descriptor, stack.config, model.dtype

    def fill(module: nn.Module | None, prefix: str) -> None:
        if module is not None:
            _materialise(module, prefix, checkpoint, dtype, device, model)

    for index in layers:
        fill(stack.layer(index), f"{descriptor.layers}.{index}")
    if stack.rotary is not None:
        stack.rotary = type(stack.rotary)(config=config).to(device)
    fill(stack.embedding, descriptor.embedding)
    fill(stack.positions, descriptor.positions)
    fill(stack.final_norm, descriptor.final_norm)
    if config.tie_word_embeddings and stack.head is not None and stack.embedding is not None:
        assert isinstance(stack.head, nn.Linear) and isinstance(stack.embedding, nn.Embedding)
        stack.head.weight = stack.embedding.weight  # one matrix, once in memory
    else:
        fill(stack.head, descriptor.embedding if config.tie_word_embeddings else descriptor.head)
    stack.eval().requires_grad_(False)


def load_stack(
    folder: Path,
    descriptor: Descriptor,
    config: Any,
    first: int,
    last: int,
    dtype: torch.dtype,
    *,
    ends: bool = True,
    device: torch.device = CPU,
) -> LayerStack:
    """Reads only the layers asked for, tensor by tensor, straight to `device`. `dtype` is the one to compute in."""
    checkpoint = Checkpoint(folder)
    config = as_stored(config, checkpoint) if ends and last == config.num_hidden_layers else config
    stack, model = stack_without_weights(descriptor, config, first, last, dtype, ends=ends)
    _fill(stack, model, range(first, last), checkpoint, device)
    return stack


def load_ends(
    folder: Path, descriptor: Descriptor, config: Any, dtype: torch.dtype, device: torch.device
) -> tuple[LayerStack, Any]:
    """A whole model's embedding, final norm and head on `device`, and the model that they are parts of. Its layers have no weights."""
    checkpoint = Checkpoint(folder)
    stack, model = stack_without_weights(descriptor, as_stored(config, checkpoint), 0, config.num_hidden_layers, dtype)
    _fill(stack, model, range(0), checkpoint, device)
    return stack, model


@torch.inference_mode()
def logits_layer_by_layer(
    folder: Path,
    descriptor: Descriptor,
    config: Any,
    dtype: torch.dtype,
    input_ids: Tensor,
    *,
    exchange: Callable[[nn.Module, int], nn.Module] = lambda layer, index: layer,
) -> Tensor:
    """The logits of a whole model for ids `[batch, tokens]`, with one layer in memory at a time besides embedding and head.

    `exchange(layer, index)` gives the layer to run in a layer's place.
    """
    checkpoint, depth = Checkpoint(folder), config.num_hidden_layers
    stack, model = load_ends(folder, descriptor, config, dtype, CPU)
    hidden = stack.embed(input_ids)
    for index in range(depth):
        layer = stack.layer(index)
        _materialise(layer, f"{descriptor.layers}.{index}", checkpoint, dtype, CPU, model)
        hidden = stack.run_layer(exchange(layer, index), index, hidden)
        layer.to_empty(device=torch.device("meta"))
    return stack.logits(hidden)
