"""Which variants of a library are less well-conditioned than the parent they stand for. The figures are in the rows of the library."""

from __future__ import annotations

from typing import Protocol

FAR_ABOVE = 5.0  # times the parent's singular value; squared, its sensitivity


class Conditioned(Protocol):
    """A row of a library; see `puzzle_ray.distill.conditioning` for what the figures are."""

    @property
    def singular_value(self) -> float: ...
    @property
    def parent_singular_value(self) -> float: ...
    @property
    def sensitivity(self) -> float: ...
    @property
    def parent_sensitivity(self) -> float: ...


def stands_out(row: Conditioned) -> str:
    """What is unusual about a row, in words; empty where nothing is. The parent's own figures are the measure."""
    words = []
    if row.singular_value > FAR_ABOVE * row.parent_singular_value:
        words.append(f"largest singular value {row.singular_value:.3g}, the parent's {row.parent_singular_value:.3g}")
    if row.sensitivity > FAR_ABOVE**2 * row.parent_sensitivity:
        words.append(f"sensitivity {row.sensitivity:.2g}, the parent's {row.parent_sensitivity:.2g}")
    return "; ".join(words)
