"""Children in formats of other programs, one file each.

The native format is `puzzle_ray.models.child`.
May import: the ground, families, variants.
"""
