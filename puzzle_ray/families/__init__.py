"""Model families. Each is one file with a table, `DESCRIPTOR`. `descriptor.py` defines the table, `registry.py` finds it.

Adding a family is adding a file.
May import: the ground (errors, artifacts, plugins ...) and nothing else of this package.
"""
