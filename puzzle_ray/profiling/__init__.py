"""What every subblock costs on the target: scenarios, devices, bytes, and measurements that are independent of each other.

`engine.py` says what an engine is; one file in `engines/` is one engine.
May import: the ground, models, export, the search's limits.
"""
