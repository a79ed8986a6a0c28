"""A child written tensor by tensor, from the parent's files and a library's to its own: no model is ever in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from puzzle_ray.artifacts import LayerChoice, SubblockKind
from puzzle_ray.errors import ParentError
from puzzle_ray.families.registry import descriptor_of
from puzzle_ray.models.checkpoint import Checkpoint, as_stored
from puzzle_ray.models.child import add_what_goes_with, child_without_weights, is_replaced
from puzzle_ray.models.folder_code import write_code

StatesOf = Callable[[int, LayerChoice], Mapping[SubblockKind, Mapping[str, Tensor]]]
MAX_FILE_BYTES = 4 << 30  # of one safetensors file
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes begin."""

    file: str
    offset: int


def write_child(
    parent: Path, parent_config: Any, choices: Sequence[LayerChoice], states_of: StatesOf, dtype: torch.dtype, folder: Path,
    made: Mapping[str, object] | None = None,
) -> int:  # fmt: skip
    """Writes the child into `folder` as `save_child` would. Returns its number of parameters.

    Subblocks that a choice replaces come from `states_of(layer, choice)`, asked for one layer at a time; all other weights are the
    parent's. Raises ParentError where a weight of the child would stay undefined.
    """
    checkpoint = Checkpoint(parent)
    config = as_stored(parent_config, checkpoint)
    model = child_without_weights(config, choices, dtype)
    descriptor = descriptor_of(config)
    found = _tensors(checkpoint, _stored(model), choices, states_of, descriptor)
    return write_model(model, found, dtype, parent, folder, made)


def write_model(
    model: Any, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, source: Path, folder: Path,
    made: Mapping[str, object] | None = None,
) -> int:  # fmt: skip
    """Writes `tensors` into `folder` in `dtype`, one after the other, as `save_child` would write `model`, which needs no weights.

    `source` is the folder that tokenizer and history come from. Returns the number of parameters. Raises ParentError where a weight of
    the model is missing.
    """
    shapes = _stored(model)
    places = _write_headers(shapes, folder)
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("r+b")) for name in {p.file for p in places.values()}}
        written = set()
        for name, value in tensors:
            if name not in shapes or shapes[name].shape != value.shape:
                own = f"{tuple(shapes[name].shape)}" if name in shapes else "nothing of that name"
                raise ParentError("parent", f"{name} is {tuple(value.shape)}, the child has {own}")
            _write(files[places[name].file], places[name].offset, value.to(shapes[name].dtype))
            written.add(name)
    if missing := shapes.keys() - written:
        raise ParentError("parent", f"no weights for {sorted(missing)[:3]} of the child")
    _write_settings(model, dtype, folder)
    add_what_goes_with(model, source, folder, made)
    return int(model.num_parameters())


def _stored(model: Any) -> dict[str, Tensor]:
    """What is stored of a model, by name."""
    shapes: dict[str, Tensor] = model.state_dict()
    if model.config.tie_word_embeddings:  # the embedding, once more
        shapes.pop(f"{descriptor_of(model.config).head}.weight", None)
    return shapes


def _tensors(
    checkpoint: Checkpoint, shapes: Mapping[str, Tensor], choices: Sequence[LayerChoice], states_of: StatesOf, descriptor: Any
) -> Iterator[tuple[str, Tensor]]:
    """All weights of the child by name: the parent's, file by file, then the library's, layer by layer."""
    yield from checkpoint.read(name for name in shapes if not is_replaced(name, choices, descriptor))
    for layer, choice in enumerate(choices):
        if choice.replaced:
            for state in states_of(layer, choice).values():
                for name, value in state.items():
                    yield f"{descriptor.layers}.{layer}.{name}", value


def _write_headers(shapes: Mapping[str, Tensor], folder: Path) -> dict[str, _Place]:
    """Writes files with room for every tensor, and an index where there are several. Returns where the tensors' bytes belong."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, value in shapes.items():
        if groups[-1] and held + value.nbytes > MAX_FILE_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += value.nbytes
    places: dict[str, _Place] = {}
    for number, names in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        offsets, header = _header({name: shapes[name] for name in names})
        with (folder / file).open("wb") as opened:
            opened.write(header)
            opened.truncate(len(header) + sum(shapes[name].nbytes for name in names))
        places |= {name: _Place(file, len(header) + offset) for name, offset in offsets.items()}
    if len(groups) > 1:
        total = {"total_size": sum(value.nbytes for value in shapes.values())}
        index = {"metadata": total, "weight_map": {name: place.file for name, place in sorted(places.items())}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return places


def _header(shapes: Mapping[str, Tensor]) -> tuple[dict[str, int], bytes]:
    """(offset of every tensor behind the header, the header), as the safetensors format has them: wider dtypes first, then by name."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name in sorted(shapes, key=lambda name: (-shapes[name].element_size(), name)):
        value = shapes[name]
        offsets[name] = end
        end += value.nbytes
        entries[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return offsets, len(text).to_bytes(8, "little") + text


def _write(file: BinaryIO, offset: int, value: Tensor) -> None:
    file.seek(offset)
    file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)


def _write_settings(model: nn.Module, dtype: torch.dtype, folder: Path) -> None:
    """`config.json`, `generation_config.json` and the code that loads them, as `save_pretrained` writes them beside the weights."""
    untyped: Any = model
    untyped.config.dtype = dtype
    untyped.config.architectures = [type(untyped).__name__]
    untyped.config.save_pretrained(folder)
    if untyped.can_generate():
        untyped.generation_config.save_pretrained(folder)
    if getattr(untyped.config, "auto_map", None):
        write_code(folder, descriptor_of(untyped.config))
