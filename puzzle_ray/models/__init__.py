"""The parent and its children as models: checkpoints on disk, layers that can be driven and exchanged alone, the child's classes.

`describe.py` meets a parent first: its family's table, or a check of a type that has none.
May import: the ground, families, surgery, variants.
"""
