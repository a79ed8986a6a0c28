"""Children of any choices in the search space, put together from the parent and the library."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.run import Run
from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.store import Artifact


def identity(run: Run, choices: Sequence[LayerChoice]) -> dict[str, str]:
    """What a child is made of, besides the library."""
    return {"parent": run.parent.key, "choices": ", ".join(choice.label for choice in choices)}


def assemble(run: Run, choices: Sequence[LayerChoice], artifact: Artifact) -> None:
    """Puts a child together on a worker; weights go from file to file."""
    from actors.lone_worker import realize, run_alone

    library = run.content("library")
    run_alone(realize, run.parent.address, choices, library, artifact, cluster=run.config.cluster, what="realize")


def of(run: Run, choices: Sequence[LayerChoice]) -> Artifact:
    """The child of any choices, assembled unless it is there."""
    inputs = {"library": run.content("library").key} | identity(run, choices)
    return run.finish(run.store.artifact("child", {}, inputs), lambda artifact: assemble(run, choices, artifact))
