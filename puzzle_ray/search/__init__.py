"""Choosing one variant per layer within a budget.

`tables.py` turns scores and costs into numbers. `mip.py` solves them. `setup.py` joins both for one budget.
`sweep.py` solves many budgets. `pick.py` measures whole children and picks one. `searchers/` holds the ways to choose.
May import: the ground.
"""
