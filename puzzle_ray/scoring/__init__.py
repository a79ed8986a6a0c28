"""The damage of every replacement, one at a time: exact, or estimated from gradients and made exact where it counts.

`shard.py` is the computation, `serial.py` the stage in one process.
May import: the ground, data, models, distill's library, the profile's byte counts.
"""
