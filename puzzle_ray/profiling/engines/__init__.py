"""Engines that run or estimate models, one file each that declares `ENGINE`. Nothing else is here.

What an engine must do: `puzzle_ray.profiling.engine.Engine`.
May import: what `profiling` may.
"""
