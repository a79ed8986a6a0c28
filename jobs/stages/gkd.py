"""Global knowledge distillation: the child learns from the parent as a whole."""

from __future__ import annotations

from typing import Any

from jobs.run import Run, Stage
from puzzle_ray.store import Artifact


def settings(run: Run) -> dict[str, Any]:
    return {"gkd": run.config.gkd.identity(), "seed": run.config.seed}


def distil(run: Run, child: Artifact, artifact: Artifact) -> None:
    """Distils a child on Ray Train."""
    from actors.gkd import run_gkd
    from puzzle_ray.distill.gkd import GkdJob

    job = GkdJob(run.parent.address, child, run.content("tokens"), artifact, run.config.gkd, run.config.seed)
    run_gkd(job, cluster=run.config.cluster, progress=run.progress)


def of(run: Run, child: Artifact) -> Artifact:
    """Any child after distillation, distilled unless it is there."""
    inputs = {"child": child.key, "tokens": run.content("tokens").key}
    return run.finish(run.store.artifact("gkd", settings(run), inputs), lambda artifact: distil(run, child, artifact))


STAGE = Stage(
    "gkd", lambda run, artifact: distil(run, run.content("child"), artifact), inputs=("child", "tokens"), settings=settings
)
