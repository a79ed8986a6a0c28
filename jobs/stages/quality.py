"""What children kept of their parent's quality: tasks, retrieval, where predictions differ, samples side by side."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

from jobs.run import NotDone, Run, Stage
from jobs.stages import gkd, tokens
from puzzle_ray.store import Artifact

QUALITY = "quality.json"


def settings(run: Run) -> dict[str, Any]:
    found = {"quality": run.config.quality_identity(), "cluster": run.config.cluster.shards_identity()}
    return found | run.config.data.mask_identity()


def sources(run: Run) -> dict[str, str]:
    from puzzle_ray.evaluation.task_names import task_sources

    config = run.config.evaluate
    found = tokens.parts(run).sources(test=config.tokens) | tokens.train_source(run) | task_sources(config.tasks)
    return found | gkd.original_source(run)


def foreseen(run: Run) -> None:
    """Raises ClusterError where no node's GPUs hold a whole parent, or nobody knows them, when all other work is still to be done."""
    from actors.memory import whole_model

    if run.config.evaluate.num_shards or run.config.cluster.autoscaling:
        return
    try:
        finished = run.artifact(STAGE.name).finished
    except NotDone:
        finished = False
    if not finished and run.config.cluster.gpus_per_shard:
        whole_model([run.original.parent.address], run.config.cluster, "a reader", STAGE.name)


def work(run: Run, artifact: Artifact) -> None:
    from actors.readers import AskOnRay
    from puzzle_ray.evaluation.quality import Quality, quality_facts
    from puzzle_ray.evaluation.requests import ANSWERS

    config = run.config
    folders = {
        "parent": run.original.parent.address,
        "child_before_gkd": run.content("child").path("child"),
        "child": run.content("gkd").path("child"),
    }
    train, _ = tokens.read(run)
    quality = Quality(
        folders,
        tokens.parts(run).test,
        train.counts(run.parent.model_config.vocab_size),
        config.evaluate,
        config.asked_half,
        config.seed,
        config.trust_remote_code,
    )
    how = (config.cluster, artifact, run.progress, config.trust_remote_code, config.evaluate.num_shards)
    with closing(AskOnRay(folders, config.evaluate.batch_tokens, *how)) as ask:
        found = quality.run(ask)
    artifact.write_json(QUALITY, found)
    artifact.finish(quality_facts(found), drop=[f"{ANSWERS}/{name}" for name in artifact.names(ANSWERS)])


def read(run: Run) -> Mapping[str, Any]:
    return dict(run.content("quality").read_json(QUALITY))


STAGE = Stage("quality", work, inputs=("gkd", "child"), reads=("tokens",), settings=settings, sources=sources, foreseen=foreseen)
