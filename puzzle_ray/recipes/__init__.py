"""Settings that come with the package, one YAML file each, and the tiny parent that recipe `tiny` trains.

`puzzle_ray.config.load` reads them.
May import: the ground.
"""
