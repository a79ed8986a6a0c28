"""The evaluation: what was kept and gained, measured beside what was predicted."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from jobs.run import NotDone, Run, Stage
from jobs.stages import architecture, gkd, scores, tokens
from puzzle_ray.store import Artifact

EVALUATION = "evaluation.json"


def settings(run: Run) -> dict[str, Any]:
    found = {"evaluate": run.config.evaluate.identity(), "profile": run.profile_config.identity()}
    found |= run.config.data.mask_identity()
    found |= {"cluster": run.config.cluster.shards_identity()} if run.config.evaluate.num_shards else {}
    scoring = run.config.scoring
    return found | ({} if scoring.downstream is None else {"downstream_questions": scoring.downstream_questions})


def sources(run: Run) -> dict[str, str]:
    return tokens.parts(run).sources(test=run.config.evaluate.tokens) | scores.downstream_source(run) | gkd.original_source(run)


def foreseen(run: Run) -> None:
    """Raises ClusterError where one CPU would evaluate a parent that is larger than a GPU, when all other work is still to be done."""
    try:
        finished = run.artifact(STAGE.name).finished
    except NotDone:
        finished = False
    if not finished:
        check_who_evaluates(run)


def check_who_evaluates(run: Run) -> None:
    """Raises ClusterError."""
    from actors import memory

    config = run.config
    if not config.evaluate.num_shards and not config.cluster.autoscaling:
        memory.check_who_evaluates(run.original.parent.address, config.cluster, run.profile_config.num_gpus, STAGE.name)


def _batches(run: Run) -> list[Any]:
    """Held-out token ids `[sequences, tokens]`, as many at a time as the settings say."""
    config = run.config.evaluate
    return tokens.batches(tokens.parts(run).test, config.tokens, config.sequences(run.config.data.sequence_length))


def compare(run: Run, folders: Mapping[str, str]) -> dict[str, Any]:
    """Held-out predictions and measured speed of models by name, `parent` and `child` among them, side by side; their answers to
    the half of the downstream questions that no block was scored by."""
    from actors.lone_worker import evaluate, evaluate_in_shards, run_alone, run_beside_shards
    from actors.model_shards import placed
    from puzzle_ray.evaluation.comparison import Comparison
    from puzzle_ray.scoring.downstream import load_questions

    profile, config, trusted = run.profile_config, run.config, run.config.trust_remote_code
    questions = load_questions(run.parent.address, config.scoring, run.parent.model_config, "test", trusted)
    timed = (config.evaluate, profile.scenario, profile.dtype)
    how = Comparison(*timed, architecture.read(run), questions, tokens.separator(run), trusted, profile.engine)
    found: dict[str, Any]
    if config.evaluate.num_shards:
        placement = placed(folders.values(), config.cluster, config.evaluate.num_shards, "evaluate")
        found = run_beside_shards(evaluate_in_shards, folders, _batches(run), how, placement=placement, what="evaluate")
        print(f"  speed is {found['not_measured']}", file=sys.stderr, flush=True)
        return found
    where: dict[str, Any] = {"cluster": config.cluster, "what": "evaluate", "profile": profile}
    found = run_alone(evaluate, folders, _batches(run), how, profile.num_gpus, **where)
    return found


def heldout_of(run: Run, distilled: Artifact) -> Mapping[str, float]:
    """Held-out loss, KL and agreement of a distilled child, nothing timed."""
    from actors.lone_worker import predict, predict_in_shards, run_alone, run_beside_shards
    from actors.model_shards import placed

    count, parts, profile = run.config.evaluate.tokens, tokens.parts(run), run.profile_config
    cluster, num_shards = run.config.cluster, run.config.evaluate.num_shards

    def work(artifact: Artifact) -> None:
        folders = {"parent": run.parent.address, "child": distilled.path("child")}
        if num_shards:
            placement = placed(folders.values(), cluster, num_shards, "evaluate")
            what = (folders, _batches(run), tokens.separator(run))
            found = run_beside_shards(predict_in_shards, *what, placement=placement, what="evaluate")
        else:
            how = (folders, _batches(run), profile.num_gpus, tokens.separator(run))
            found = run_alone(predict, *how, cluster=cluster, what="evaluate", profile=profile)
        artifact.finish(found["child"])

    inputs = {"child": distilled.key} | parts.sources(test=count)
    settings = {"tokens": count} | run.config.data.mask_identity()
    return run.finish(run.store.artifact("heldout", settings, inputs), work).facts()


def work(run: Run, artifact: Artifact) -> None:
    child, distilled = run.content("child"), run.content("gkd")
    folders = {"parent": run.original.parent.address, "child_before_gkd": child.path("child"), "child": distilled.path("child")}
    with run.progress.stage("evaluate", 1, "comparison") as bar:
        found = compare(run, folders)
        bar.advance()
    artifact.write_json(EVALUATION, found | {"heldout": tokens.parts(run).ranges})
    artifact.finish({name: found[name] for name in ("measured_speedup", "predicted_speedup")})


def read(run: Run) -> Mapping[str, Any]:
    return dict(run.content("evaluation").read_json(EVALUATION))


STAGE = Stage(
    "evaluation",
    work,
    inputs=("gkd", "child", "architecture"),
    reads=("tokens",),
    settings=settings,
    sources=sources,
    foreseen=foreseen,
)
