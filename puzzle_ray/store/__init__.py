"""Where artifacts live: one folder per stage run under a root that is a path or any fsspec URL.

A stage's key is a hash of its name, its settings, the keys of what it read and the schema version, and names its folder:
`<root>/<stage>-<key>`. Files inside appear complete or not at all; the record `artifact.json` is written last and lists the size and
SHA-256 of every file, so a folder that has one is finished, and damage is seen. Items written before it (one file each) are what a
resumed stage does not do again. A run that works on a folder holds its lease.
"""

from puzzle_ray.store.address import artifact_at, verified_folder
from puzzle_ray.store.artifact import Artifact, Store
from puzzle_ray.store.cache import local_copy
from puzzle_ray.store.lease import Lease
from puzzle_ray.store.once import StillToDo, adding_items, do_once, only_looking
from puzzle_ray.store.record import RECORD, SCHEMA_VERSION, Problem, content_key
from puzzle_ray.store.scratch import clear_abandoned

__all__ = [
    "RECORD",
    "SCHEMA_VERSION",
    "Artifact",
    "Lease",
    "Problem",
    "StillToDo",
    "Store",
    "adding_items",
    "artifact_at",
    "clear_abandoned",
    "content_key",
    "do_once",
    "local_copy",
    "only_looking",
    "verified_folder",
]
