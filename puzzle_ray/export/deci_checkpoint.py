"""A child as a whole `nemotron-nas` (DeciLM) checkpoint: config, weights, tokenizer, and the code to load it with transformers.

Weights are copied from file to file, one shard in memory at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from puzzle_ray.errors import ConfigError
from puzzle_ray.export import deci_model
from puzzle_ray.export.configuration_nemotron_nas import NemotronNasConfig
from puzzle_ray.export.engine_rules import problems
from puzzle_ray.export.nemotron_nas import check_parent, copy_config_class, nas_config
from puzzle_ray.models.checkpoint import FLOATS, Checkpoint
from puzzle_ray.models.child import choices_of, copy_history, copy_tokenizer, read_config
from puzzle_ray.models.child_classes import FILE_MODE
from puzzle_ray.models.folder_code import SURGERY, joined

SHARD_BYTES = 5_000_000_000
MODEL_MODULE = "modeling_nemotron_nas"
CLASSES = {"AutoModel": f"{MODEL_MODULE}.DeciLMModel", "AutoModelForCausalLM": f"{MODEL_MODULE}.DeciLMForCausalLM"}
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


class _Source:
    """A tensor of the exported checkpoint: rows of one of the child's."""

    def __init__(self, stored: str, dtype: str, shape: tuple[int, ...], rows: slice | None = None) -> None:
        self.stored, self.dtype, self.rows = stored, dtype, rows
        self.shape = shape if rows is None else (rows.stop - rows.start, *shape[1:])

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]


def export_nemotron_nas(child: Path, target: Path, engines: Sequence[str], untie: bool = False) -> None:
    """Writes the child in `child` to `target`. Raises ParentError or ConfigError, before it writes, for what an engine cannot have."""
    config, checkpoint = read_config(child), Checkpoint(child)
    check_parent(config)  # another family's tensors have other names
    tensors = _tensors(checkpoint, config)
    if untie and config.tie_word_embeddings:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = _Source(embedding.stored, embedding.dtype, embedding.shape)
        config.tie_word_embeddings = False
    elif config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    dtype = FLOATS[tensors["model.embed_tokens.weight"].dtype]
    settings = nas_config(config, choices_of(config), dtype, more_classes=CLASSES)
    shapes = {name: source.shape for name, source in tensors.items()}
    for engine in engines:
        found = problems(engine, settings, shapes)
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise ConfigError("export", f"{engine} could not run this child: {found[0]}{more}")
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    copy_config_class(target)
    (target / f"{MODEL_MODULE}.py").write_text(_code())
    _write_weights(checkpoint, tensors, target)
    copy_tokenizer(child, target)
    copy_history(child, target)
    for file in target.rglob("*"):
        if file.is_file():
            file.chmod(FILE_MODE)


def _code() -> str:
    config = NemotronNasConfig
    imported = [f"from .{config.__module__.rpartition('.')[2]} import {config.__name__}"]
    about = "A child of a Llama-shaped model in the nemotron-nas (DeciLM) format."
    return joined(about, (*SURGERY, deci_model.__name__), imported, "")


def _tensors(checkpoint: Checkpoint, config: Any) -> dict[str, _Source]:
    """The exported tensors by name. Fused projections are split, as DeciLM has them apart."""
    found: dict[str, _Source] = {}
    for stored, (dtype, shape) in sorted(checkpoint.headers.items()):
        before, _, last = stored.rpartition(".")
        if before.endswith(".qkv_proj"):
            queries = config.num_attention_heads * (
                getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            )
            keys = (shape[0] - queries) // 2
            parts = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        elif before.endswith(".gate_up_proj"):
            parts = {"gate_proj": shape[0] // 2, "up_proj": shape[0] // 2}
        else:
            found[stored] = _Source(stored, dtype, shape)
            continue
        start = 0
        for name, rows in parts.items():
            found[f"{before.rpartition('.')[0]}.{name}.{last}"] = _Source(stored, dtype, shape, slice(start, start + rows))
            start += rows
    return found


def _shards(tensors: dict[str, _Source]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, source in tensors.items():
        if names and size + source.num_bytes > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += source.num_bytes
    yield names


def _write_weights(checkpoint: Checkpoint, tensors: dict[str, _Source], target: Path) -> None:
    from safetensors.torch import save_file

    shards = list(_shards(tensors))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        stored = dict.fromkeys(tensors[name].stored for name in names)
        values = dict(checkpoint.read(stored))
        parts = {}
        for name in names:
            source = tensors[name]
            value = values[source.stored]
            parts[name] = (value if source.rows is None else value[source.rows]).clone()
        save_file(parts, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(s.num_bytes for s in tensors.values())}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
