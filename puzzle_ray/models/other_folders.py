"""What a place is that is no Hugging Face model folder, or lacks its weights, and what to name or do instead."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_LOOKED_AT = 200  # folders
_NAMED = "name a Hugging Face model folder"
_OTHERS = {  # files by which other formats are known: what they are, and what to do
    "adapter_config.json": ("holds an adapter, not a model", "merge it into its model (PEFT's merge_and_unload), and save that"),
    "*.gguf": ("holds GGUF files, whose weights are quantized", "give the checkpoint they were made from"),
    "params.json": (
        "holds a checkpoint in its makers' own format (params.json)",
        "give it as Hugging Face has it, with a config.json",
    ),
    "model_index.json": ("is a pipeline of diffusers, of several models", _NAMED),
    "*.distcp": ("holds a distributed checkpoint of a training", "save the model by save_pretrained"),
    "*.nemo": ("holds a NeMo checkpoint", "export it to Hugging Face's format"),
    ".metadata": ("holds a distributed checkpoint of a training", "save the model by save_pretrained"),
}


def why_no_folder(path: Path, named: str) -> tuple[str, str]:
    """(what is wrong, what to do) where `path` is a file."""
    return f"{named!r} is a file", f"name the folder that it lies in, {str(path.parent)!r}, if it is a model's"


def why_no_config(folder: Path, named: str) -> tuple[str, str]:
    """(what is wrong, what to do) where a folder has no config.json."""
    if (link := folder / _CONFIG).is_symlink() and not link.exists():
        return _broken_link(link)
    for pattern, (words, remedy) in _OTHERS.items():
        if next(folder.glob(pattern), None) is not None:
            return f"{named!r} has no {_CONFIG}: it {words}", remedy
    inside = next((path.parent for path in islice(_below(folder), _LOOKED_AT) if path.is_file()), None)
    return f"{named!r} has no {_CONFIG}", f"name {str(inside)!r}, which has one" if inside else _NAMED


def _below(folder: Path) -> Iterator[Path]:
    """Where a folder inside may have its config: a training's checkpoints, a hub's cache, a stage of a store."""
    for pattern in ("*", "snapshots/*", "*/snapshots/*"):
        yield from (path / _CONFIG for path in sorted(folder.glob(pattern)))


def why_no_weights(folder: Path) -> tuple[str, str]:
    """(what is wrong, what to do) where a folder has neither weights in one file nor an index of shards."""
    for name in (_WEIGHTS, _INDEX):
        if (folder / name).is_symlink():
            return _broken_link(folder / name)
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if any("-of-" in name for name in found):
        return f"{folder} has {found[0]}, and no {_INDEX} that lists it", "fetch that file, too"
    if found:
        return f"{folder} has {found[0]}, and no {_WEIGHTS}", f"if it holds the whole model, name it {_WEIGHTS}"
    return f"{folder} has no {_WEIGHTS}", "load the model with transformers and save_pretrained it, which writes that file"


def _broken_link(link: Path) -> tuple[str, str]:
    return f"{link} is a link to {str(link.readlink())!r}, which is not there", "fetch the model again"
