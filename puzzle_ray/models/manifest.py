"""The file is the model: what a parent's weight files say they hold, against the model that its config builds.

Only headers are read, and the model is built without memory, so that a parent of any size is looked at in seconds. What transformers
would drop, or draw at random, is refused by name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from puzzle_ray.errors import ParentError
from puzzle_ray.families.registry import descriptor_of
from puzzle_ray.models.blocks import model_class_of
from puzzle_ray.models.checkpoint import (
    FLOATS,
    Checkpoint,
    as_stored,
    check_floats,
    check_names,
    first_line,
    is_ignored,
    read_json,
    some,
)

_LAYER_NUMBER = re.compile(r"(?:^|\.)(\d{1,9})\.")


def check_weights(folder: Path, config: Any) -> tuple[str, ...]:
    """Compares names, shapes, dtypes and tying of the weight files in `folder` with the model of `config`.

    Returns what a user should be told though it is no fault, a sentence each. Raises ParentError. Reads tensors in one case only:
    head and embedding, up to the first difference, where a file holds both and the config says that they are one.
    """
    _refuse_other_formats(folder, config)
    checkpoint = Checkpoint(folder)
    config = copy.deepcopy(as_stored(config, checkpoint))
    _check_depth(folder, checkpoint, config)
    model = _without_memory(folder, config)
    ignored = _ignored(model, config)
    check_floats(checkpoint, ignored)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found, unexpected = {}, []
    for stored, (_, shape) in checkpoint.headers.items():
        name = next((n for n in (stored, f"{model.base_model_prefix}.{stored}") if n in expected), None)
        if name in found:
            raise ParentError("parent", f"{folder} holds {name} twice, once as {stored}", "remove one of the two")
        if name is not None:
            found[name] = shape
        elif not is_ignored(stored, ignored):
            unexpected.append(stored)
    twice = set(model.get_expanded_tied_weights_keys(all_submodels=True))  # a tied head is not stored
    patterns = model._keys_to_ignore_on_load_missing or ()
    missing = [name for name in expected.keys() - found.keys() - twice if not is_ignored(name, patterns)]
    check_names(folder, missing, unexpected)
    shapes = [f"{name} is {list(shape)}, not {list(expected[name])}" for name, shape in found.items() if shape != expected[name]]
    if shapes:
        remedy = "take config.json and weights from the same model"
        raise ParentError("parent", f"{folder} holds weights of other shapes than its config.json: {some(shapes)}", remedy)
    return tuple(_remarks(folder, config))


def _refuse_other_formats(folder: Path, config: Any) -> None:
    """Folders whose weights are not, or not alone, what the config and `model.safetensors` say."""
    if getattr(config, "quantization_config", None):
        raise ParentError("parent", f"the weights in {folder} are quantized", "give the checkpoint they were made from")
    if (folder / "adapter_config.json").exists():
        raise ParentError("parent", f"{folder} holds an adapter (adapter_config.json)", "merge it into its model and save that")
    if (folder / "generation_config.json").exists():
        read_json(folder / "generation_config.json")  # raises; else the first to load a whole model would
    if getattr(config, "transformers_weights", None):
        problem = f"{folder}/config.json has its weights in {config.transformers_weights!r}"
        raise ParentError("parent", problem, "save the model as model.safetensors")
    dtype = getattr(config, "dtype", None)
    if dtype is not None and str(dtype).removeprefix("torch.") not in FLOATS.values():
        problem = f"{folder}/config.json has dtype {str(dtype).removeprefix('torch.')!r}"
        raise ParentError("parent", problem, f"use one of {', '.join(FLOATS.values())}")


def _check_depth(folder: Path, checkpoint: Checkpoint, config: Any) -> None:
    """Layers that are not there are not built to be compared. The last layers of a child may have no weights."""
    numbers = [int(found[1]) for name in checkpoint.headers if (found := _LAYER_NUMBER.search(name))]
    held, said = max(numbers, default=-1) + 1, config.num_hidden_layers
    if said > held and not str(config.model_type).startswith("puzzle_"):
        problem = f"{folder} lacks weights that its config.json asks for: it says {said} layers, and the files hold {held}"
        raise ParentError("parent", problem, "take config.json and weights from the same model")


def _without_memory(folder: Path, config: Any) -> Any:
    """The config's model on the meta device."""
    import torch

    descriptor = descriptor_of(config)
    model_class = model_class_of(config, descriptor)
    config._attn_implementation = descriptor.attn_implementation
    try:
        with torch.device("meta"):
            return model_class._from_config(config, dtype=torch.float32)
    except MemoryError:
        raise
    except Exception as error:  # whatever the family's own code raises
        problem = f"no model can be built from {folder}/config.json ({first_line(error)})"
        raise ParentError("parent", problem, "mend it or fetch it again") from None


def _ignored(model: Any, config: Any) -> tuple[str, ...]:
    """Patterns of stored names that nobody reads: the family's, and those that transformers passes over."""
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    return (
        *descriptor_of(config).ignored_weights,
        *(model._keys_to_ignore_on_load_unexpected or ()),
        *([r"rotary_emb\.inv_freq$"] if "inv_freq" in buffers else []),
        *([r"(^|\.)position_ids$"] if "position_ids" in buffers else []),
    )


def _remarks(folder: Path, config: Any) -> Iterable[str]:
    raw = read_json(folder / "config.json")
    if raw.get("sliding_window") is not None and not hasattr(config, "sliding_window"):
        yield (
            f"{folder}/config.json says sliding_window={raw['sliding_window']}, which {type(config).__name__} does not have: "
            "every token sees all before it, as in transformers"
        )
    said = raw.get("tie_word_embeddings", type(config)().tie_word_embeddings)
    if said and not config.tie_word_embeddings:
        yield (
            f"{folder}/config.json says tie_word_embeddings=true, but the head there is not the embedding: "
            "both are read as they are, as transformers does, and children are saved with both"
        )
