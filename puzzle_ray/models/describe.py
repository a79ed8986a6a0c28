"""Finds the table of a parent's family by its config, and checks a model type that has no table.

A model type without a table is treated as shaped like Llama if it passes a check. The check has two parts. First the model is built
without weights from the parent's own config. Every layer must have Llama's modules and no others. Then a small model with the same
settings, and a layer of every kind, is built with random weights. It is divided into layers, every layer into halves, and it is rebuilt
as a child of parent blocks only. Each time the logits must equal those of the whole model, bit for bit.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

from puzzle_ray.artifacts import LayerChoice, SearchSpace, SubblockKind
from puzzle_ray.errors import ConfigError, ParentError
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
_KINDS_OF_LAYERS = 8  # at most, in the small model
# Variants of another size: an example for the small model, all that it stands for, and what they change.
_RESIZED: dict[SubblockKind, tuple[str, ...]] = {
    "attention": ("gqa:1", "gqa", "gqa_prune", "another number of KV heads"),
    "ffn": ("ffn:24", "ffn", "ffn_iterative", "an FFN of another width"),
}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
_TYPES_OF_LAYERS = {"full_attention", "sliding_attention"}


def describe(config: Any) -> Descriptor:
    """The descriptor for a transformers config. Raises ParentError where the family, or a setting of it, is not supported."""
    descriptor = descriptor_of(config)
    model_type = descriptor.model_type
    _check_masks(config, model_type)
    if model_type not in families():
        _check_like_llama(descriptor, config)
    for name, values in descriptor.unsupported.items():
        if getattr(config, name, None) in values:
            raise ParentError("parent", f"{model_type} with {name}={getattr(config, name)!r} is not supported")
    problem = descriptor.check(config) if descriptor.check else ""
    if problem:
        raise ParentError("parent", f"{model_type} with {problem} is not supported")
    return descriptor


def _check_masks(config: Any, model_type: str) -> None:
    """Raises ParentError for tokens that see what comes behind them, and for types of layers that the family's own code does not read."""
    if not getattr(config, "is_causal", True):
        raise ParentError(
            "parent", f"{model_type} with is_causal=False is not supported", "give a model that predicts the next token"
        )
    types = sorted(set(getattr(config, "layer_types", None) or ()))
    if other := sorted(set(types) - _TYPES_OF_LAYERS):
        raise unsupported_family(model_type, f"it has layers of type {', '.join(other)}")
    if types and not hasattr(type(config)(), "layer_types"):
        problem = (
            f"{model_type} with layer_types of {', '.join(types)} is not supported: in transformers all its layers are alike"
        )
        raise ParentError("parent", problem, "take config.json as the model was published, with the model_type that it has there")
    if "sliding_attention" in types and not getattr(config, "sliding_window", None):
        problem = f"{model_type} with layer_types of sliding_attention has no sliding_window"
        raise ParentError("parent", problem, "take config.json as the model was published")


def _check_like_llama(descriptor: Descriptor, config: Any) -> None:
    """Raises ParentError that says what differs from Llama."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    experts = [name for name in _EXPERTS if getattr(config, name, None) not in (None, 0, 1)]
    if experts:
        problem = f"it has FFNs of several experts ({experts[0]}={getattr(config, experts[0])})"
        raise unsupported_family(descriptor.model_type, problem)
    problem = _problem(descriptor.model_type, _settings(config))
    if not problem and get_checkpoint_conversion_mapping(descriptor.model_type):  # single tensors are read here, by their names
        problem = "transformers reads its weights under other names than the files have"
    if problem:
        raise unsupported_family(descriptor.model_type, problem)


def _settings(config: Any) -> str:
    """As JSON: those of the model that a child was made of in the first place."""
    from puzzle_ray.models.child import original_config

    settings = copy.deepcopy(original_config(config)).to_dict()
    for name in ("model_type", "architectures", "transformers_version", "dtype"):
        settings.pop(name, None)
    return json.dumps(settings, sort_keys=True, default=str)


def check_resizing(config: Any, space: SearchSpace) -> None:
    """Raises ConfigError for variants of another size than the parent's where a type without a table cannot have them."""
    descriptor = descriptor_of(config)
    if descriptor.model_type in families():
        return
    for kind, (example, *names, words) in _RESIZED.items():
        used = {name.partition(":")[0] for layer in space.layers for name in layer.variants(kind)} & set(names)
        if used and not _can_be(LayerChoice(**{kind: example}), descriptor.model_type, _settings(config)):
            problem = f"layers of family {descriptor.model_type!r} cannot have {words}"
            raise ConfigError(f"space.{kind}", problem, f"leave out {', '.join(sorted(used))}")


@cache
def _can_be(choice: LayerChoice, model_type: str, settings: str) -> bool:
    """Whether a small model whose first layer is `choice` runs, and gives the same with a cache."""
    import torch

    from puzzle_ray.models.child_classes import child_classes
    from puzzle_ray.surgery.kv_cache import cache_from, continuing

    small = _shrunk(json.loads(settings))
    child_config, child_model = child_classes(model_type)
    layers = [{"attention": choice.attention, "ffn": choice.ffn}] + [{"attention": "parent", "ffn": "parent"}]
    settings_of_child = small | {"puzzle_layers": layers[:1] + layers[1:] * (small["num_hidden_layers"] - 1)}
    ids = torch.arange(_TOKENS).remainder(small["vocab_size"]).unsqueeze(0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            child: Any = child_model(child_config(**settings_of_child)).float().eval()
            _randomise(child)
            whole, half = child(ids, use_cache=False).logits, _TOKENS // 2
            cache = cache_from(child(ids[:, :half], use_cache=True))
            return torch.allclose(child(ids[:, half:], **continuing(cache)).logits, whole[:, half:], atol=1e-3)
        except (ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError):
            return False


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
        own = config_class(**_shrunk(json.loads(_settings(config))))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class: Any = getattr(transformers, descriptor.model_class)
        model = model_class._from_config(own, attn_implementation=descriptor.attn_implementation).float().eval()
        _randomise(model)
    return model


def _shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings for a small model: one layer of every kind that lists with an entry per layer tell apart, at least two layers."""
    layers = settings.get("num_hidden_layers")
    by_layer = {k: v for k, v in settings.items() if isinstance(v, list) and len(v) == layers}
    kinds: dict[str, int] = {}
    for index in range(layers if by_layer and layers else 0):
        kinds.setdefault(repr([v[index] for v in by_layer.values()]), index)
    chosen = sorted({*list(kinds.values())[:_KINDS_OF_LAYERS], *([0, 1][:layers] if len(kinds) < 2 else [])})
    small = settings | {k: [v[index] for index in chosen if index < len(v)] for k, v in by_layer.items()}
    return small | {k: v for k, v in _SMALL.items() if settings.get(k) is not None} | {"num_hidden_layers": len(chosen)}


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


def _randomise(model: Any) -> None:
    """Weights large enough that blocks matter."""
    from torch.nn import init

    for parameter in model.parameters():
        init.normal_(parameter, 0.0, 0.25) if parameter.dim() > 1 else init.uniform_(parameter, 0.5, 1.5)


def _differs(model: Any, descriptor: Descriptor) -> str:
    """What the divided or rebuilt model computes differently, in words, or the empty string."""
    import torch

    from puzzle_ray.models.blocks import LayerStack, swapped
    from puzzle_ray.models.child_classes import child_classes

    _randomise(model)
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
