"""Puzzle (arXiv 2411.19146): search a faster child for a trained language model. This package never imports Ray."""

from puzzle_ray.version import __version__

__all__ = ["__version__"]
