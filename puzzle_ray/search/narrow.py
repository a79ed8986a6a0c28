"""A search space narrowed to the variants of architectures that were found before.

The first, decoupled library is cheap per variant and approximate; what its searches chose is worth more: whole pairs trained
together (coupled BLD; paper, section 3.2), or a longer training. Per layer the narrowed space has the parent's own subblocks and
every attention and every FFN variant that some architecture has there, in the order of the whole space.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from puzzle_ray.artifacts import PARENT, LayerChoice, LayerSpace, SearchSpace, SubblockKind
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.errors import ConfigError

WHERE = "library.narrow_from"
FILES = ("architecture.json", "sweep.json")
FORMS = "name an architecture.json, a sweep.json or sweep.parquet, or the folder of such a step"
Choices = tuple[LayerChoice, ...]


def library_space(whole: SearchSpace, config: LibraryConfig) -> SearchSpace:
    """What is trained, scored and searched: the whole space, or what `narrow_from` leaves of it. Raises ConfigError where that
    cannot be read, does not fit, or leaves more pairs in a layer than `max_pairs` in mode coupled."""
    if config.narrow_from is None:
        return whole
    space = narrowed(whole, architectures(config.narrow_from))
    pairs = [len(layer.choices) - 1 for layer in space.layers]
    if max(pairs) == 0:
        raise ConfigError(WHERE, "its architectures replace nothing", "name one that is smaller than the parent")
    if config.mode == "decoupled":
        return space
    if max(pairs) > config.max_pairs:
        problem = f"{max(pairs)} pairs are left in layer {pairs.index(max(pairs))}, and coupled training takes {config.max_pairs}"
        raise ConfigError(WHERE, problem, "name fewer architectures, raise library.max_pairs, or write library.mode: decoupled")
    return SearchSpace(tuple(replace(layer, coupled=True) for layer in space.layers))


def narrowed(whole: SearchSpace, found: Sequence[Choices]) -> SearchSpace:
    """Raises ConfigError for an architecture of another depth, or with a variant that the whole space does not have."""
    for choices in found:
        if len(choices) != len(whole.layers):
            problem = f"it has an architecture of {len(choices)} layers, and the parent has {len(whole.layers)}"
            raise ConfigError(WHERE, problem, "name one of this parent")

    def left(index: int, layer: LayerSpace, kind: SubblockKind) -> tuple[str, ...]:
        wanted = {PARENT, *(choices[index].variant(kind) for choices in found)}
        unknown = sorted(wanted - set(layer.variants(kind)))
        if unknown:
            problem = f"layer {index} has {unknown[0]!r} there, which is not in the search space"
            raise ConfigError(WHERE, problem, f"add it to space.{kind}")
        return tuple(name for name in layer.variants(kind) if name in wanted)

    layers = enumerate(whole.layers)
    kept = (replace(layer, attention=left(i, layer, "attention"), ffn=left(i, layer, "ffn")) for i, layer in layers)
    return SearchSpace(tuple(kept))


def architectures(source: str) -> list[Choices]:
    """The architectures in a file, or in the folder of a finished step; a path or any fsspec URL. Raises ConfigError."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(source if "://" in source else str(Path(source).expanduser().absolute()))
        if filesystem.isdir(path):
            inside = [f"{path.rstrip('/')}/{name}" for name in FILES]
            path = next((name for name in inside if filesystem.exists(name)), "")
            if not path:
                raise ConfigError(WHERE, f"neither {' nor '.join(FILES)} is in {source!r}", FORMS)
        data = bytes(filesystem.cat_file(path))
    except ConfigError:
        raise
    except Exception as error:  # every backend has errors of its own
        raise ConfigError(WHERE, f"{source!r} cannot be read ({error})", FORMS) from None
    try:
        found = _of_table(data) if path.endswith(".parquet") else _of_json(json.loads(data))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(WHERE, f"{source!r} holds no architectures ({type(error).__name__}: {error})", FORMS) from None
    if not found:
        raise ConfigError(WHERE, f"no budget of {source!r} could be met, so it has no architecture", "name a sweep that has one")
    return found


def _of_json(raw: Any) -> list[Choices]:
    """Of one architecture, or of a sweep's points: those without an answer are left out."""
    answers = [raw] if isinstance(raw, dict) else [point["architecture"] for point in raw]
    return [tuple(LayerChoice(**choice) for choice in answer["choices"]) for answer in answers if answer is not None]


def _of_table(data: bytes) -> list[Choices]:
    """Of a sweep's parquet table: labels such as `gqa:2 + parent | noop + ffn:64`."""
    import pyarrow.parquet as pq

    rows = pq.read_table(io.BytesIO(data), columns=["choices"]).column("choices").to_pylist()
    return [tuple(LayerChoice(*label.split(" + ")) for label in row.split(" | ")) for row in rows if row]
