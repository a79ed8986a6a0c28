"""Finds the table of a parent's family by its config, and checks a model type that has no table.

A model type without a table is treated as shaped like Llama if it passes a check. The check has two parts. First the model is built
without weights from the parent's own config. Every layer must have Llama's modules and no others. Then a small model with the same
settings is built with random weights. It is divided into layers, every layer into halves, and it is rebuilt as a child of parent
blocks only. Each time the logits must equal those of the whole model, bit for bit.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

from puzzle_ray.errors import ParentError
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.families.registry import descriptor_of, families, llama_like, unsupported_family

_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 4,
    "pad_token_id": None,
}
_SMALL_OF_SOME = {"attention_types": [[["global", "local"], 1]], "window_size": 4, "word_embed_proj_dim": 32}
_TOKENS = 12


def describe(config: Any) -> Descriptor:
    """The descriptor for a transformers config. Raises ParentError where the family, or a setting of it, is not supported."""
    descriptor = descriptor_of(config)
    model_type = descriptor.model_type
    if model_type not in families():
        _check_like_llama(descriptor, config)
    for name, values in descriptor.unsupported.items():
        if getattr(config, name, None) in values:
            raise ParentError("parent", f"{model_type} with {name}={getattr(config, name)!r} is not supported")
    problem = descriptor.check(config) if descriptor.check else ""
    if problem:
        raise ParentError("parent", f"{model_type} with {problem} is not supported")
    return descriptor


def _check_like_llama(descriptor: Descriptor, config: Any) -> None:
    """Raises ParentError that says what differs from Llama."""
    problem = _problem(descriptor.model_type, json.dumps(_settings(config), sort_keys=True, default=str))
    if problem:
        raise unsupported_family(descriptor.model_type, problem)


def _settings(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = copy.deepcopy(config).to_dict()
    for name in ("model_type", "architectures", "transformers_version", "puzzle_layers", "dtype"):
        found.pop(name, None)
    return found


def small_model(config: Any) -> Any:
    """A small model of a config's type with random weights, always the same.

    Of a type with a table it has the settings that all of that type have by default; of another one, those of the config.
    """
    import torch
    import transformers

    descriptor = descriptor_of(config)
    config_class = getattr(transformers, descriptor.config_class)
    if descriptor.model_type in families():
        known = config_class()
        own = config_class(**{name: value for name, value in (_SMALL | _SMALL_OF_SOME).items() if hasattr(known, name)})
    else:
        own = config_class(**_shrunk(json.loads(json.dumps(_settings(config), default=str))))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class: Any = getattr(transformers, descriptor.model_class)
        model = model_class._from_config(own, attn_implementation=descriptor.attn_implementation).float().eval()
        _draw(model)
    return model


def _draw(model: Any) -> None:
    """Weights large enough that every part matters."""
    import torch

    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.25) if parameter.dim() > 1 else torch.nn.init.uniform_(parameter, 0.5, 1.5)


def _shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings for a small model of two layers. Lists with one entry per layer are shortened."""
    layers = settings.get("num_hidden_layers")
    small = {k: v[:2] if isinstance(v, list) and len(v) == layers else v for k, v in settings.items()}
    return small | {k: v for k, v in _SMALL.items() if settings.get(k) is not None}


@cache
def _problem(model_type: str, settings: str) -> str:
    """What differs from Llama, in words, or the empty string. `settings` is JSON."""
    import torch
    import transformers

    descriptor, given = llama_like(model_type), json.loads(settings)
    config_class = getattr(transformers, descriptor.config_class)
    model_class: Any = getattr(transformers, descriptor.model_class)
    try:
        with torch.device("meta"):
            whole = model_class._from_config(config_class(**given), attn_implementation="sdpa")
        problem = _unlike(whole, descriptor)
        if problem:
            return problem
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small = model_class._from_config(config_class(**_shrunk(given)), attn_implementation="sdpa").float().eval()
            return _differs(small, descriptor)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines() or ["no reason given"]
        return f"the check failed ({type(error).__name__}: {reason[0].partition('. ')[0]})"


def _unlike(model: Any, descriptor: Descriptor) -> str:
    """Which modules are missing or not in Llama, in words, or the empty string."""
    from torch import nn

    for name in (descriptor.embedding, descriptor.layers, descriptor.final_norm, descriptor.rotary, descriptor.head):
        try:
            model.get_submodule(name)
        except AttributeError:
            return f"it has no module {name}"
    projections = {"attention": ("query", "key", "value", "output"), "ffn": ("ffn_gate", "ffn_up", "ffn_down")}
    own = {descriptor.attention, descriptor.ffn, *descriptor.attention_norms, *descriptor.ffn_norms}
    for index, layer in enumerate(model.get_submodule(descriptor.layers)):
        with_weights = {name for name, child in layer.named_children() if any(True for _ in child.parameters())}
        if with_weights != own:
            return f"layer {index} consists of {', '.join(sorted(with_weights))}, not of {', '.join(sorted(own))}"
        for kind, fields in projections.items():
            core = layer.get_submodule(descriptor.module(kind))  # type: ignore[arg-type]
            for part in (getattr(descriptor, field) for field in fields):
                if not isinstance(getattr(core, part, None), nn.Linear):
                    return f"layer {index} has no linear {descriptor.module(kind)}.{part}"  # type: ignore[arg-type]
            if kind == "attention" and not isinstance(getattr(core, "head_dim", None), int):
                return f"layer {index} does not say its head_dim"
    return ""


def _differs(model: Any, descriptor: Descriptor) -> str:
    """What the divided or rebuilt model computes differently, in words, or the empty string."""
    import torch

    from puzzle_ray.artifacts import LayerChoice
    from puzzle_ray.models.blocks import LayerStack, swapped
    from puzzle_ray.models.child_classes import child_classes

    _draw(model)
    config = model.config
    ids = torch.arange(2 * _TOKENS).remainder(config.vocab_size).reshape(2, _TOKENS)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        stack = LayerStack(model, descriptor, config, 0, config.num_hidden_layers)
        hidden = stack.embed(ids)
        for index in range(config.num_hidden_layers):
            layer, entering = stack.layer(index), hidden
            hidden = stack.run_layer(layer, index, entering)
            for choice in (LayerChoice(ffn="noop"), LayerChoice(attention="noop")):
                entering = stack.run_layer(swapped(layer, choice, descriptor, config), index, entering)
            if not torch.equal(entering, hidden):
                return "its attention and FFN do not follow one another, each behind its norm"
        if not torch.equal(stack.logits(hidden), logits):
            return "cut into layers it gives other logits"
        child_config, child_model = child_classes(descriptor.model_type)
        settings = config.to_dict() | {"puzzle_layers": [{"attention": "parent", "ffn": "parent"}] * config.num_hidden_layers}
        settings.pop("model_type")
        child: Any = child_model(child_config(**settings)).float().eval()
        child.load_state_dict(model.state_dict())
        if not torch.equal(child(ids, use_cache=False).logits, logits):
            return "rebuilt it gives other logits"
    return ""
