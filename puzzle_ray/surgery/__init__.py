"""What is put in a subblock's place, and how projections are cut: modules for no-op, linear, grouped and windowed attention.

`kv_cache.py` knows what transformers calls a cache.
May import: the ground, families.
"""
