"""The run's page: one HTML file that needs nothing but itself.

`contents.py` says what it is made from; whatever is missing is left out.
May import: the ground.
"""
