"""Children in the formats of other programs, one file each.

The native format is in `puzzle_ray.models.child`.
May import: the ground, families, surgery, variants, models.
"""
