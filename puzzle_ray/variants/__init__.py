"""Subblock variants. Each is one file that declares `VARIANT`. `base.py` defines what a variant is and finds one by its name.

`space.py` resolves the names in a config against a parent.
May import: the ground, families, surgery, calibration.
"""
