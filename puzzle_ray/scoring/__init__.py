"""Replace-one scores: the damage of every replacement. Exact, or estimated from gradients and exact where the search uses it.

`replacements.py` says what is scored, `shard.py` computes it, `serial.py` is the stage in one process.
May import: the ground, data, models, distill's losses, the profile's byte counts.
"""
