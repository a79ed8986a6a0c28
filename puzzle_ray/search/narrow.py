"""A search space narrowed to the variants of architectures that an earlier search found.

A first library trains every variant alone (decoupled). That is cheap and approximate. The variants that its searches chose deserve
more: pairs trained together (coupled BLD, arXiv 2411.19146 v5, section 3.2), or a longer training.
Per layer, the narrowed space has the parent's own subblocks and every attention and FFN variant that some architecture has there.
The order is that of the whole space.

An architecture of a later round, or of any run whose parent was a child itself, says nothing of what that child had replaced already. It is
read together with that, so that all architectures are counted from the original model; and where the parent here is a child, what it
is already is its own.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from puzzle_ray.artifacts import PARENT, Choices, LayerChoice, LayerSpace, SearchSpace, SubblockKind
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.errors import ConfigError
from puzzle_ray.store import Artifact, artifact_at
from puzzle_ray.variants.space import is_less

SETTING = "library.narrow_from"
FILES = ("architecture.json", "sweep.json")
_LONGEST_REASON = 200
ACCEPTED_SOURCES = "name an architecture.json, a sweep.json or sweep.parquet, or the folder of such a step"


def library_space(whole: SearchSpace, config: LibraryConfig) -> SearchSpace:
    """The space that is trained, scored and searched: the whole one, or what `narrow_from` leaves of it.

    Raises ConfigError where `narrow_from` cannot be read, does not fit, or leaves more pairs in a layer than `max_pairs` (coupled).
    """
    if config.narrow_from is None:
        return whole
    space = narrowed(whole, read_architectures(config.narrow_from))
    pairs = [len(layer.choices) - 1 for layer in space.layers]
    if max(pairs) == 0 and whole.now:
        problem = "this parent, a child itself, is already all that its architectures have"
        raise ConfigError(SETTING, problem, "name one that is smaller than this parent")
    if max(pairs) == 0:
        raise ConfigError(SETTING, "its architectures replace nothing", "name one that is smaller than the parent")
    if config.mode == "decoupled":
        return space
    if max(pairs) > config.max_pairs:
        problem = f"{max(pairs)} pairs are left in layer {pairs.index(max(pairs))}, and coupled training takes {config.max_pairs}"
        raise ConfigError(SETTING, problem, "name fewer architectures, raise library.max_pairs, or write library.mode: decoupled")
    return SearchSpace(tuple(replace(layer, coupled=True) for layer in space.layers))


def narrowed(whole: SearchSpace, architectures: Sequence[Choices]) -> SearchSpace:
    """The variants that some architecture has, and the parent's own.

    `architectures` are counted from the original model. Raises ConfigError for one of another depth, or with a variant that the whole
    space does not have.
    """
    for choices in architectures:
        if len(choices) != len(whole.layers):
            problem = f"it has an architecture of {len(choices)} layers, and the parent has {len(whole.layers)}"
            raise ConfigError(SETTING, problem, "name one of this parent")

    def variants_kept(index: int, layer: LayerSpace, kind: SubblockKind) -> tuple[str, ...]:
        own = layer.now.variant(kind)
        wanted = {PARENT, *(choices[index].variant(kind) for choices in architectures)} - ({own} - {PARENT})
        unknown = sorted(wanted - set(layer.variants(kind)))
        if unknown and not is_less(unknown[0], own):
            problem = (
                f"layer {index} has {unknown[0]!r} there, and this parent, a child itself, has {own!r}, which cannot become that"
            )
            raise ConfigError(SETTING, problem, "name an architecture of this parent, or of one that was made from it")
        if unknown:
            problem = f"layer {index} has {unknown[0]!r} there, which is not in the search space"
            raise ConfigError(SETTING, problem, f"add it to space.{kind}")
        return tuple(name for name in layer.variants(kind) if name in wanted)

    layers = enumerate(whole.layers)
    kept = (
        replace(layer, attention=variants_kept(i, layer, "attention"), ffn=variants_kept(i, layer, "ffn")) for i, layer in layers
    )
    return SearchSpace(tuple(kept))


def read_architectures(source: str) -> list[Choices]:
    """The architectures in a file or in a finished artifact's folder: a path or any fsspec URL. They are counted from the original model.

    Raises ConfigError.
    """
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(source if "://" in source else str(Path(source).expanduser().absolute()))
        if filesystem.isdir(path):
            inside = [f"{path.rstrip('/')}/{name}" for name in FILES]
            path = next((name for name in inside if filesystem.exists(name)), "")
            if not path:
                raise ConfigError(SETTING, f"neither {' nor '.join(FILES)} is in {source!r}", ACCEPTED_SOURCES)
        data, now = _read(filesystem, path, source)
    except ConfigError:
        raise
    except Exception as error:  # every backend has errors of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
        raise ConfigError(SETTING, f"{source!r} cannot be read ({reason})", ACCEPTED_SOURCES) from None
    try:
        found = _from_parquet(data) if path.endswith(".parquet") else _from_json(json.loads(data))
        architectures = [_counted_from_original(choices, now if own is None else own) for choices, own in found]
    except Exception as error:  # JSON and parquet have errors of their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
        raise ConfigError(SETTING, f"{source!r} holds no architectures ({reason})", ACCEPTED_SOURCES) from None
    if not architectures:
        raise ConfigError(
            SETTING, f"no budget of {source!r} could be met, so it has no architecture", "name a sweep that has one"
        )
    return architectures


def _read(filesystem: Any, path: str, source: str) -> tuple[bytes, Choices]:
    """A file's bytes, compared with the record where it belongs to a finished artifact; and `_now_of` that. Raises ConfigError."""
    found = artifact_at(filesystem.unstrip_protocol(path) if "://" in source else path)
    if found is None:
        return bytes(filesystem.cat_file(path)), ()
    artifact, name = found
    problem = artifact.record_problem()
    if problem:
        raise ConfigError(SETTING, f"{source!r} belongs to an artifact whose record {problem}", "search again with this version")
    return artifact.read(name), _now_of(artifact, source)


def _now_of(artifact: Artifact, source: str) -> Choices:
    """What the parent of a search was already; empty for an original model.

    By what its JSON says, which a sweep's table does not; of a search of an earlier version by the space of the library that it read.
    Raises ConfigError for one of a later round that cannot be followed.
    """
    written = [artifact.read_json(name) for name in FILES if artifact.exists(name)]
    said = [now for raw in written for _, now in _from_json(raw) if now is not None]
    if said:
        return said[0]
    read: Artifact | None = artifact
    for stage in ("scores", "library"):
        record = read.record() if read else None
        key = record.inputs.get(stage) if record else None
        read = Artifact(artifact.store, stage, key, {}, {}) if key else None
    record = read.record() if read else None
    if record is not None and "space" in record.inputs:
        return SearchSpace.from_json(record.inputs["space"].encode()).now
    own = artifact.record()
    number, rounds = (own.settings.get("round") if own else None) or (1, 1)
    if number > 1:
        problem = f"{source!r} is of round {number} of {rounds}, and its library, by which the rounds before are known, is not in its store"
        raise ConfigError(SETTING, problem, "name it in the store that it was made in, or an architecture of round 1")
    return ()


def _counted_from_original(choices: Choices, now: Choices) -> Choices:
    return tuple(choice.on(own) for choice, own in zip(choices, now, strict=True)) if now else choices


Read = tuple[Choices, Choices | None]  # an architecture, and what its parent was already; None where that is not said there


def _from_json(raw: Any) -> list[Read]:
    """From one architecture, or from the points of a sweep. Points without an architecture are left out."""
    answers = [raw] if isinstance(raw, dict) else [point["architecture"] for point in raw]
    return [(_choices(x["choices"]), _choices(x["now"]) if "now" in x else None) for x in answers if x is not None]


def _choices(raw: Any) -> Choices:
    return tuple(LayerChoice(**choice) for choice in raw)


def _from_parquet(data: bytes) -> list[Read]:
    """From a sweep's parquet table, which has labels such as `gqa:2 + parent | noop + ffn:64`."""
    import pyarrow.parquet as pq

    rows = pq.read_table(io.BytesIO(data), columns=["choices"]).column("choices").to_pylist()
    return [(tuple(LayerChoice(*label.split(" + ")) for label in row.split(" | ")), None) for row in rows if row]
