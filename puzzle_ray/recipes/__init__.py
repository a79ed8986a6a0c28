"""Recipes: settings that come with the package, one YAML file each. Also the tiny parent, which recipe `tiny` trains.

`puzzle_ray.config.load` reads the YAML files.
May import: the ground.
"""
