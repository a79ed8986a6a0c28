"""The shape of a layer in the words of its config, and the surgery that gives a layer this shape.

The words are those of transformers' `per_layer_config`: `skip` lists the subblocks that are left out (`attention`, `mlp`),
`num_key_value_heads` and the FFN's width, under its family's name, are the sizes of this layer. Two are ours: `linear` lists the
subblocks in whose place there is a matrix, and `window` is the number of tokens that the layer's attention sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.surgery.projections import resize_attention, resize_ffn
from puzzle_ray.surgery.subblocks import LinearAttention, LinearFFN, NoopAttention, NoopFFN
from puzzle_ray.surgery.window import limit_window

ATTENTION, FFN = "attention", "mlp"  # the subblocks in `skip` and `linear`
SKIP, LINEAR, HEADS, WINDOW = "skip", "linear", "num_key_value_heads", "window"


def remove_attention(layer: nn.Module, descriptor: Descriptor) -> None:
    """Leaves out the attention and its norms, in place."""
    old: Any = layer.get_submodule(descriptor.attention)
    if isinstance(old, NoopAttention | LinearAttention):
        config, index = old.config, old.layer_idx
    else:
        config, index = descriptor.core(layer, "attention").config, getattr(old, descriptor.layer_index)
    _put_attention(layer, NoopAttention(config, index), descriptor)
    for norm in descriptor.norms("attention"):
        setattr(layer, norm, nn.Identity())


def remove_ffn(layer: nn.Module, descriptor: Descriptor) -> None:
    """Leaves out the FFN and its norms, in place."""
    setattr(layer, descriptor.ffn, NoopFFN())
    for norm in descriptor.norms("ffn"):
        setattr(layer, norm, nn.Identity())


def linear_attention(layer: nn.Module, descriptor: Descriptor) -> None:
    """Puts a matrix in place of the attention. It has a bias if the output projection has one; its weights are undefined."""
    core = descriptor.core(layer, "attention")
    last = getattr(core, descriptor.output)
    index = getattr(layer.get_submodule(descriptor.attention), descriptor.layer_index)
    with torch.device("meta"):
        new = LinearAttention(core.config, index, last.bias is not None)
    _put_attention(layer, new.to(last.weight.dtype).to_empty(device=last.weight.device), descriptor)


def _put_attention(layer: nn.Module, new: nn.Module, descriptor: Descriptor) -> None:
    old = layer.get_submodule(descriptor.attention)
    if hasattr(old, "is_sliding"):  # Gemma 3 asks for it in transformers 4
        new.is_sliding = old.is_sliding
    setattr(layer, descriptor.attention, new)


def linear_ffn(layer: nn.Module, descriptor: Descriptor, hidden_size: int) -> None:
    """Puts a matrix in place of the FFN. It has a bias if the down projection has one; its weights are undefined."""
    last = getattr(descriptor.core(layer, "ffn"), descriptor.ffn_down)
    with torch.device("meta"):
        new = LinearFFN(hidden_size, last.bias is not None)
    setattr(layer, descriptor.ffn, new.to(last.weight.dtype).to_empty(device=last.weight.device))
    for name in descriptor.ffn_rest:
        setattr(layer, name, nn.Identity())


def narrow_window(layer: nn.Module, window: int, descriptor: Descriptor) -> None:
    """Limits the attention to a window, in place."""
    attention, config = layer.get_submodule(descriptor.attention), descriptor.core(layer, "attention").config
    limit_window(attention, window, getattr(attention, descriptor.layer_index), config)


def with_begun_weights(model: Any, layers: nn.Module, reshape: Callable[[], None]) -> None:
    """Runs `reshape`, and gives the modules that it makes the weights that a new model of the family begins with.

    Somebody may train the model from its beginning (`AutoModelForCausalLM.from_config`). On device meta nothing is done, and the random
    numbers that are drawn later are the same with and without this.
    """
    before = set(layers.modules())
    reshape()
    made = [module for module in layers.modules() if module not in before]
    if any(parameter.is_meta for module in made for parameter in module.parameters()):
        return
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for module in made:
            model._init_weights(module)


def reshape_by_words(layer: nn.Module, words: Mapping[str, Any], descriptor: Descriptor, config: Any) -> None:
    """Gives a layer in its parent's shape the shape that `words` say, in place. The weights of what changes are undefined."""
    skipped, linear = words.get(SKIP) or (), words.get(LINEAR) or ()
    if ATTENTION in skipped:
        remove_attention(layer, descriptor)
    elif ATTENTION in linear:
        linear_attention(layer, descriptor)
    else:
        if words.get(HEADS) is not None:
            resize_attention(layer, int(words[HEADS]), descriptor)
        if words.get(WINDOW) is not None:
            narrow_window(layer, int(words[WINDOW]), descriptor)
    if FFN in skipped:
        remove_ffn(layer, descriptor)
    elif FFN in linear:
        linear_ffn(layer, descriptor, config.hidden_size)
    elif words.get(descriptor.ffn_width) is not None:
        resize_ffn(layer, int(words[descriptor.ffn_width]), descriptor)
