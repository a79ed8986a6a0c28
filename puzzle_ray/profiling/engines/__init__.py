"""Engines that time models or estimate their times: one file each, which declares `ENGINE`. Nothing else is in this folder.

What an engine must do: see `puzzle_ray.profiling.engine.Engine`.
May import: what `profiling` may.
"""
