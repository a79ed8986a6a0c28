"""A child as a Hugging Face folder: `config.json`, safetensors, tokenizer, the code to load it, and a model card.

`child_classes.py` has its classes, `folder_code.py` the code, and `card.py` the card.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from puzzle_ray.artifacts import KINDS, PARENT, LayerChoice, SubblockKind
from puzzle_ray.errors import ParentError
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.families.registry import complete_config, descriptor_of, families, unsupported_family
from puzzle_ray.models.card import CARD, HISTORY, add_card
from puzzle_ray.models.checkpoint import (
    Checkpoint,
    as_stored,
    check_floats,
    check_names,
    first_line,
    is_ignored,
    locate,
    read_json,
)
from puzzle_ray.models.child_classes import FILE_MODE, child_classes, register_children
from puzzle_ray.models.child_settings import OURS, version_4_rope

TOKENIZER_FILES = (  # patterns
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model*",  # sentencepiece's, as the next two
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tokenization_*.py",  # of a tokenizer with code of its own
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)


_ABOUT = ("model_type", "architectures", "transformers_version")  # in a config: what says whose it is


def original_config(config: Any) -> Any:
    """The config of the model that a child was made of in the first place: its family's own, all layers alike. A plain one as it is."""
    if not getattr(config, "puzzle_layers", None):
        return config
    descriptor, settings = descriptor_of(config), config.to_dict()
    own = (*_ABOUT, *OURS, "puzzle_layers", "per_layer_config", "auto_map", *(version_4_rope(settings)))
    for name in (*own, "logit_scale") if descriptor.logits_divisor else own:
        settings.pop(name, None)
    return getattr(transformers, descriptor.config_class)(**settings)


def child_config(parent_config: Any, choices: Sequence[LayerChoice]) -> Any:
    """The child's config: all settings of the parent, and the choice for each layer. Where the parent is a child itself, choices are
    counted from the original model."""
    config_class, model_class = child_classes(descriptor_of(parent_config).model_type)
    settings = complete_config(copy.deepcopy(original_config(parent_config))).to_dict()
    for name in _ABOUT:
        settings.pop(name, None)
    whole = [choice.on(now) for choice, now in zip(choices, choices_of(parent_config), strict=True)]
    layers = [{"attention": c.attention, "ffn": c.ffn} for c in whole]
    return config_class(puzzle_layers=layers, architectures=[model_class.__name__], **settings)


def _skeleton(parent_config: Any, choices: Sequence[LayerChoice], dtype: torch.dtype) -> Any:
    """A child of the right shapes. Its weights are random."""
    config = child_config(parent_config, choices)
    descriptor = descriptor_of(config)
    _, model_class = child_classes(descriptor.model_type)
    config._attn_implementation = descriptor.attn_implementation
    return model_class._from_config(config, dtype=dtype)  # type: ignore[attr-defined]


def child_without_weights(parent_config: Any, choices: Sequence[LayerChoice], dtype: torch.dtype) -> Any:
    """A child of the right shapes on device meta: nothing is allocated."""
    with torch.device("meta"):
        return _skeleton(parent_config, choices, dtype)


@torch.no_grad()
def new_child(parent_config: Any, choices: Sequence[LayerChoice], dtype: torch.dtype) -> Any:
    """A child of the right shapes with random weights.

    Matrices are normal with the config's `initializer_range` as standard deviation, biases are 0, and norms are 1.
    """
    child = _skeleton(parent_config, choices, dtype)
    descriptor = descriptor_of(child.config)
    for choice, layer in zip(choices_of(child.config), child.get_submodule(descriptor.layers), strict=True):
        for kind in KINDS:
            if choice.variant(kind) == PARENT:
                continue
            names = (descriptor.module(kind), *descriptor.norms(kind))
            for module in (part for name in names for part in layer.get_submodule(name).modules()):
                for name, parameter in module.named_parameters(recurse=False):
                    if parameter.dim() > 1:
                        parameter.normal_(0.0, getattr(child.config, "initializer_range", 0.02))
                    elif name == "bias":
                        parameter.zero_()
    return child


def assemble(
    parent: Path,
    parent_config: Any,
    choices: Sequence[LayerChoice],
    trained: Mapping[tuple[int, SubblockKind], Mapping[str, Tensor]],
    dtype: torch.dtype,
) -> Any:
    """A child whose replaced subblocks come from `trained`, and whose other weights are the parent's.

    `trained` maps (layer, kind) to weights by their names inside the layer. Raises ParentError where a weight of the child would stay
    undefined.
    """
    descriptor, checkpoint = descriptor_of(parent_config), Checkpoint(parent)
    parent_config = as_stored(parent_config, checkpoint)
    child = _skeleton(parent_config, choices, dtype).eval()
    state = child.state_dict()
    wanted = {name: value for name, value in state.items() if not is_replaced(name, choices, descriptor)}
    head = {f"{descriptor.head}.weight"} if parent_config.tie_word_embeddings else set()  # the embedding, once more
    wanted = {name: value for name, value in wanted.items() if name not in head}
    with torch.no_grad():
        for name, value in checkpoint.read(wanted):
            state[name].copy_(value)
        filled = set(wanted)
        for (layer, _), weights in trained.items():
            for name, value in weights.items():
                full_name = f"{descriptor.layers}.{layer}.{name}"
                state[full_name].copy_(value)
                filled.add(full_name)
    missing = state.keys() - filled - head
    if missing:
        raise ParentError("parent", f"no weights for {sorted(missing)[:3]} of the child")
    return child


def is_replaced(name: str, choices: Sequence[LayerChoice], descriptor: Descriptor) -> bool:
    """Whether a weight belongs to a subblock that is not the parent's own."""
    if not name.startswith(f"{descriptor.layers}."):
        return False
    index, _, rest = name[len(descriptor.layers) + 1 :].partition(".")
    return any(choices[int(index)].variant(kind) != PARENT and rest.startswith(descriptor.prefixes(kind)) for kind in KINDS)


def save_child(child: Any, source: Path, folder: Path, made: Mapping[str, object] | None = None) -> None:
    """Writes the child into `folder`, with the tokenizer and the history in `source`, its parent's folder or an earlier child's.

    `made` is the step of this history that the child comes from: it stands in the model card.
    """
    child.save_pretrained(folder)
    add_what_goes_with(child, source, folder, made)


def add_what_goes_with(child: Any, source: Path, folder: Path, made: Mapping[str, object] | None) -> None:
    """Tokenizer, history and model card, and the mode of all files, see `save_child`."""
    copy_tokenizer(source, folder)
    add_card(child, source, folder, made)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(FILE_MODE)


def copy_tokenizer(source: Path, target: Path, patterns: Iterable[str] = TOKENIZER_FILES) -> None:
    """Copies what a folder has of these files."""
    for file in (file for pattern in patterns for file in sorted(source.glob(pattern)) if file.is_file()):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def copy_history(source: Path, target: Path) -> None:
    """The model card and what it is made from."""
    copy_tokenizer(source, target, (CARD, HISTORY))


def load_model(folder: str | Path, dtype: torch.dtype | None = None) -> Any:
    """A child or a plain Hugging Face causal LM, in eval mode, in `dtype` or by default in its own.

    Raises ParentError where the folder is missing, or where it has no causal LM that transformers can build.
    """
    from transformers import AutoModelForCausalLM

    path = locate(str(folder))
    config, checkpoint = read_config(path), Checkpoint(path)
    ignored = descriptor_of(config).ignored_weights
    check_floats(checkpoint, ignored)
    known = families().get(config.model_type.removeprefix("puzzle_"))
    attention = known.attn_implementation if known else "sdpa"
    settings = {"config": config, "dtype": dtype or "auto", "attn_implementation": attention, "use_safetensors": True}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, trust_remote_code=False, **settings)
    except MemoryError:
        raise
    except Exception as error:  # whatever the library raises
        raise ParentError("model", f"{path} cannot be loaded ({first_line(error)})") from None
    check_names(path, found["missing_keys"], [name for name in found["unexpected_keys"] if not is_ignored(name, ignored)])
    return model.eval()


def model_without_weights(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The causal LM of a folder with shapes and dtypes only (device meta), in `dtype` or by default in its own."""
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    known = families().get(config.model_type.removeprefix("puzzle_"))
    settings = {
        "dtype": dtype or config.dtype or torch.float32,
        "attn_implementation": known.attn_implementation if known else "sdpa",
    }
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **settings)


def choices_of(config: Any) -> tuple[LayerChoice, ...]:
    """The choice of every layer of a model; `parent` everywhere for a model that is no child."""
    layers = getattr(config, "puzzle_layers", None) or [{}] * config.num_hidden_layers
    return tuple(LayerChoice(**layer) for layer in layers)


def read_config(folder: Path) -> Any:
    """The transformers config of a folder, with head and embedding tied as the weights there have them (see `tied`).

    Raises ParentError when it cannot be read, or is of a type that only the folder's own code knows. Never runs that, nor asks.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    file = folder / "config.json"
    raw = read_json(file)
    register_children(folder)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise ParentError("parent", f"{file} names no model_type", "take it from the model that the weights belong to")
    if "auto_map" in raw and model_type not in CONFIG_MAPPING:
        problem = f"{file} asks for code of the model's own (auto_map, model_type {model_type!r}), which could not be divided into blocks"
        raise ParentError("parent", problem, "name a model that transformers itself has code for")
    if model_type not in CONFIG_MAPPING:
        raise unsupported_family(model_type, "this version of transformers does not know that type")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # whatever the library raises
        raise ParentError("parent", f"{file} cannot be read ({first_line(error)})", "mend it or fetch it again") from None
    text = getattr(config, "text_config", None)
    if text is not None:
        problem = f"{file} is of a model of several parts ({model_type!r}), of which one reads text"
        own = getattr(text, "model_type", None) or "its own"
        raise ParentError("parent", problem, f"give its language model alone, saved with a config.json of model_type {own!r}")
    config.return_dict = True  # what a model returns is read by name here
    config.output_attentions = config.output_hidden_states = False  # nobody reads them, and sdpa refuses
    forget_unused_windows(config)
    checkpoint = Checkpoint(folder)
    return as_stored(config, checkpoint) if checkpoint.present else config


def forget_unused_windows(config: Any) -> None:
    """Takes windows out of a config, in place, that the family's own class does not have: its layers see all tokens.

    Masks and caches are made by what a config says, whoever's it is. A list of layers' types goes where it says nothing more than that.
    """
    own = type(config)()
    if getattr(config, "sliding_window", None) is not None and not hasattr(own, "sliding_window"):
        del config.sliding_window
    types = getattr(config, "layer_types", None)
    if types and not hasattr(own, "layer_types"):
        windowed = getattr(config, "sliding_window", None) is not None
        if set(types) == {"sliding_attention" if windowed else "full_attention"}:
            del config.layer_types


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switches off the progress bars of transformers while the context is open. They are then as before."""
    from transformers.utils import logging

    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            # our commands set HF_HUB_DISABLE_PROGRESS_BARS; the hub would warn that it has priority
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                logging.enable_progress_bar()
