"""Distillation: of single blocks (BLD: candidates, schedule, library), of whole children (GKD), and the losses of both.

`realize.py` puts a child together from a library.
May import: the ground, data, models and what is below them.
"""
