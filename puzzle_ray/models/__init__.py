"""The parent and its children as models: checkpoints on disk, layers that run and are replaced one at a time, the child's classes.

`describe.py` finds the table of a parent's family, or checks a parent of a family that has none.
May import: the ground, families, surgery, variants.
"""
