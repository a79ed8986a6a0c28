"""Subblock variants, one file each that declares `VARIANT`; `base.py` says what one is and finds it by name.

`space.py` resolves the names in a config against a parent.
May import: the ground, families, surgery, calibration.
"""
