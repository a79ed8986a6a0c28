"""Replace-one scores: the damage of every variant, one replacement at a time."""

from __future__ import annotations

from typing import Any

from jobs.run import Run, Stage
from jobs.stages import tokens
from puzzle_ray.artifacts import Scores
from puzzle_ray.search.choose import Answers, MakeExact
from puzzle_ray.store import Artifact, adding_items
from puzzle_ray.version import torch_series


def settings(run: Run) -> dict[str, Any]:
    found = {"scoring": run.config.scoring.identity(), "torch": torch_series(), "cluster": run.config.cluster.shards_identity()}
    return found | run.config.data.mask_identity()


def sources(run: Run) -> dict[str, str]:
    return tokens.parts(run).sources(score=run.config.scoring.tokens) | downstream_source(run)


def downstream_source(run: Run) -> dict[str, str]:
    """The questions that blocks are scored and children tested by, where there are any."""
    from puzzle_ray.data.sources import source_fingerprint

    questions = run.config.scoring.downstream
    return {} if questions is None else {"questions": source_fingerprint(questions)}


def _arguments(run: Run, artifact: Artifact) -> tuple[Any, ...]:
    """Of the scoring pool: everything that scores are computed from."""
    library, config = run.content("library"), run.config
    return (
        run.parent.address,
        run.space,
        library,
        config.scoring,
        config.cluster,
        tokens.parts(run).score,
        artifact,
        run.progress,
        run.config.trust_remote_code,
    )


def work(run: Run, artifact: Artifact) -> None:
    from actors.scoring import score_blocks

    score_blocks(*_arguments(run, artifact))


def read(run: Run) -> Scores:
    from puzzle_ray.scoring.replacements import SCORES_TABLE

    return Scores.from_parquet(run.content("scores").read(SCORES_TABLE))


def exact(run: Run) -> MakeExact | None:
    """What makes scores exact where answers use estimates; None where all are exact. What is scored for that is kept for all budgets."""
    if not run.config.scoring.makes_exact:
        return None
    artifact = run.store.artifact("exact_scores", {}, {"scores": run.artifact("scores").key})

    def make(scores: Scores, answers: Answers) -> Scores:
        from actors.scoring import scoring
        from puzzle_ray.scoring.exact import exact_where_used

        with adding_items(artifact), scoring(*_arguments(run, artifact)) as score:
            return exact_where_used(scores, run.config.scoring.metric, answers, score)

    return make


def identity(run: Run) -> dict[str, Any]:
    """What a search's answer depends on besides its own settings."""
    return {"metric": run.config.scoring.metric, "exact": run.config.scoring.makes_exact, "seed": run.config.seed}


STAGE = Stage("scores", work, inputs=("library",), reads=("tokens",), settings=settings, sources=sources)
