"""Rotary frequencies that depend on how long the longest row of a batch is (longrope, as Phi-3 has it)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def constant_up_to(config: Any) -> int | None:
    """The number of tokens up to which a row's frequencies are the same in any company. None where they always are.

    Longrope has one set of frequencies for batches up to that length, and another one for longer batches. (Frequencies of type
    `dynamic` are constant up to `max_position_embeddings`, which no row exceeds.)
    """
    return min(_original_lengths(config), default=None)


def _original_lengths(config: Any) -> Iterator[int]:
    for rope in _ropes(getattr(config, "rope_parameters", None) or {}):
        if rope.get("rope_type") == "longrope":
            original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
            yield int(original or config.max_position_embeddings)


def _ropes(parameters: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """One set of parameters, or one per type of layer."""
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (each for each in parameters.values() if isinstance(each, Mapping))


@contextmanager
def never_growing(model: Any) -> Iterator[None]:
    """While this is open, frequencies of type `dynamic` stay as they are. Otherwise they look at positions, and where a model has only
    shapes there are none to look at."""
    found = [(module, module.rope_type) for module in model.modules() if "dynamic" in str(getattr(module, "rope_type", ""))]
    for module, kind in found:
        module.rope_type = "default" if isinstance(kind, str) else dict.fromkeys(kind, "default")
    try:
        yield
    finally:
        for module, kind in found:
            module.rope_type = kind
