"""Model families: one table each, a file that declares `DESCRIPTOR`. `descriptor.py` says what a table holds, `registry.py` finds it.

Adding a family is adding a file.
May import: the ground (errors, artifacts, plugins ...) and nothing else of this package.
"""
