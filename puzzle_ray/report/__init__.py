"""A run's report: one HTML file that needs nothing but itself.

`contents.py` says what a report is made from. A section is left out where its data are missing.
May import: the ground, and what distillation says of its results in words (`distill/outliers.py`, `distill/summary.py`).
"""
