"""Puzzle (arXiv 2411.19146): search a faster child for a trained language model. This package never imports Ray."""

__version__ = "0.1.0"
