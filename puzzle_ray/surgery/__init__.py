"""The modules that replace a subblock (no-op, linear, grouped and windowed attention), and the resizing of projections.

`kv_cache.py` knows the name that transformers has for the KV cache.
May import: the ground, families.
"""
