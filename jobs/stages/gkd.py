"""Global knowledge distillation: the child learns from the parent as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jobs.run import NotDone, Run, Stage
from jobs.stages import tokens
from puzzle_ray.store import Artifact
from puzzle_ray.version import torch_series

if TYPE_CHECKING:
    from puzzle_ray.distill.gkd import GkdJob
    from puzzle_ray.distill.settings import GkdConfig

SEQUENCES = 8  # of a batch of held-out text


def settings(run: Run, config: GkdConfig | None = None) -> dict[str, Any]:
    """Of the run's own distillation, or of one that is configured otherwise."""
    found = {"gkd": (config or run.config.gkd).identity(), "seed": run.config.seed, "torch": torch_series()}
    return found | run.config.data.mask_identity()


def foreseen(run: Run) -> None:
    """Raises ClusterError for GPUs that are missing when all other work is done, ConfigError for sequences longer than the text.

    Not where this stage is finished, nor, of GPUs, where `hardware` has said so: what is not finished then waits for such nodes.
    """
    from jobs.checks import check_gpus_of_gkd

    try:
        finished = run.artifact(STAGE.name).finished
    except NotDone:
        finished = False
    if finished:
        return
    if not run.original.decided:
        check_gpus_of_gkd(run.config)
    check_lengths(run)


def check_lengths(run: Run) -> None:
    """Raises ConfigError for a stage of distillation whose sequences are longer than the text."""
    from puzzle_ray.distill.curriculum import Curriculum

    if run.config.gkd.stages:
        Curriculum.of(tokens.read(run)[0], run.config.gkd, run.config.seed)


def said(facts: Mapping[str, Any]) -> str:
    from puzzle_ray.distill.summary import gkd_summary

    return gkd_summary(facts)


def sources(run: Run) -> dict[str, str]:
    """What is trained on, and what training is watched on: held-out text of the part that picks, never of the one that is reported."""
    watched = run.config.gkd.heldout_tokens
    found = tokens.train_source(run) | (tokens.parts(run).sources(pick=watched) if watched else {})
    return found | original_source(run)


def original_source(run: Run) -> dict[str, str]:
    """The model that children are distilled towards and compared with, where that is not the parent."""
    return {"original": run.original.parent.key} if run.after else {}


def job_of(run: Run, child: Artifact, artifact: Artifact, config: GkdConfig | None = None) -> GkdJob:
    """What the distillation of a child reads and writes."""
    from puzzle_ray.distill.gkd import GkdJob

    config, seed = config or run.config.gkd, run.config.seed
    heldout = tuple(tokens.batches(tokens.parts(run).pick, config.heldout_tokens, SEQUENCES)) if config.heldout_tokens else ()
    parent, text, trusted = run.original.parent.address, run.content("tokens"), run.config.trust_remote_code
    return GkdJob(parent, child, text, artifact, config, seed, None, heldout, tokens.separator(run), trusted)


def distil(run: Run, child: Artifact, artifact: Artifact) -> None:
    """Distils a child on Ray Train."""
    from actors.gkd import run_gkd

    run_gkd(job_of(run, child, artifact), cluster=run.config.cluster, progress=run.progress)


def artifact_of(run: Run, child: Artifact, config: GkdConfig | None = None) -> Artifact:
    """Where a child is after distillation, finished or not."""
    return run.store.artifact("gkd", settings(run, config), {"child": child.key} | sources(run))


def of(run: Run, child: Artifact) -> Artifact:
    """Any child after distillation, distilled unless it is there."""
    return run.finish(artifact_of(run, child), lambda artifact: distil(run, child, artifact))


STAGE = Stage(
    "gkd",
    lambda run, artifact: distil(run, run.content("child"), artifact),
    inputs=("child",),
    reads=("tokens",),
    settings=settings,
    sources=sources,
    said=said,
    foreseen=foreseen,
)
