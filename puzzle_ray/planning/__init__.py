"""What a run will need, before any of it is started: bytes per process and stage, bytes through the object store, FLOPs and hours.

`demand.py` counts, `hardware.py` reads a cluster's description and says what does not fit, `resolve.py` decides by both.
May import: the ground, models, variants, scoring's plan, the profile's devices and byte counts.
"""
