"""The stages of a run, one file each that declares `STAGE` (see `jobs.run.Stage`).

A stage's file also says how its result is read: `read(run)`.
May import: `jobs.run`, other stages that it reads, actors, puzzle_ray.
"""
