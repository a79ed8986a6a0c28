"""Thin Ray shells around `puzzle_ray`: each states resources and retry policy, and nothing else."""
