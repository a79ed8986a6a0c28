"""What every subblock costs on the target hardware, measured or estimated.

`measure.py` measures in tasks that are independent of each other. `engine.py` says what an engine is. One file in `engines/` is one
engine. `memory.py` counts bytes, `scenarios.py` says what is served, and `devices.py` what is known of devices.
May import: the ground, models, export, the search's limits.
"""
