"""Thin Ray shells around `puzzle_ray`: each states resources and retry policy, and nothing else.

Importing this package changes one thing: Python looks for dead cycles less often until the process computes. Ray imports it in every
worker before all that is heavy, and there is no other moment.
"""

from puzzle_ray.process import start_quickly

start_quickly()
