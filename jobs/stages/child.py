"""The child as assembled from the parent and the library."""

from __future__ import annotations

from jobs.run import Stage
from jobs.stages import architecture
from jobs.stages.assembly import assemble, identity

STAGE = Stage(
    "child",
    lambda run, artifact: assemble(run, architecture.read(run).choices, artifact),
    inputs=("library",),
    reads=("architecture",),
    sources=lambda run: identity(run, architecture.read(run).choices),
)
