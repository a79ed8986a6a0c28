"""Distillation of single blocks (BLD) into a library, and of whole children (GKD). The losses and the learning rate serve both.

`realize.py` puts a child together from a library.
May import: the ground, data, models and what is below them.
"""
