"""Puzzle (arXiv 2411.19146): search a faster child for a trained language model. This package never imports Ray.

Once it is imported, transformers loads children as it loads its own models, see `puzzle_ray.registration`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from puzzle_ray.registration import register_when_transformers_is_imported
from puzzle_ray.version import __version__

if TYPE_CHECKING:
    from puzzle_ray.pipeline import compress

__all__ = ["__version__", "compress"]


def __getattr__(name: str) -> Any:
    """`compress` is imported when it is first used: it needs torch, and importing this package must not."""
    if name == "compress":
        from puzzle_ray.pipeline import compress

        return compress
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_when_transformers_is_imported()
