"""One variant per layer within a budget: the problem in numbers, its exact solution, sweeps, and the pick by measurement.

`tables.py` makes the numbers, `mip.py` solves them, `setup.py` joins both for one budget.
May import: the ground.
"""
