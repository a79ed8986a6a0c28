"""The architecture: one variant per layer, least damage within the budget; picked by measurement where asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from jobs.run import Run, Stage
from jobs.stages import profile, scores, tokens
from puzzle_ray.artifacts import Architecture, Measure, Scores
from puzzle_ray.search.choose import ARCHITECTURE, SCORES, choose, save_choice
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.pick import PICKED
from puzzle_ray.search.rounds import counted_from_original, limits_of_round
from puzzle_ray.search.searcher import searcher_sources
from puzzle_ray.search.setup import SearchSetup
from puzzle_ray.store import Artifact, adding_items


def settings(run: Run) -> dict[str, Any]:
    rounds = {"round": [run.number, run.config.rounds]} if run.config.rounds > 1 else {}
    found = {"search": run.config.search.identity(), "memory": run.profile_config.memory()}
    return found | scores.identity(run) | rounds


def limits(run: Run) -> Limits:
    """Of this round."""
    asked, scenario = run.config.search.limits, run.profile_config.scenario
    return limits_of_round(asked, run.number, run.config.rounds, run.space, profile.read(run), scenario)


def setup(run: Run) -> SearchSetup:
    """All that a search of this run's own scenario reads besides its budget."""
    config, search = run.config, run.config.search
    numbers = (run.space, scores.read(run), profile.read(run), run.profile_config.scenario, config.scoring.metric)
    return SearchSetup(*numbers, search.searcher, search.time_limit_s, limits(run), config.seed)


@contextmanager
def measuring(run: Run) -> Iterator[Measure]:
    """A context with a function that measures whole children on held-out text; what it measured is kept for all budgets."""
    from actors.child_meter import measuring as pool

    count = run.config.search.measure_tokens
    sequences = max(1, run.config.scoring.micro_batch_tokens // run.config.data.sequence_length)
    parts = tokens.parts(run)
    batches = tokens.batches(parts.pick, count, sequences)
    library = run.content("library")
    inputs = {"library": library.key} | parts.sources(pick=count)
    scoring = run.config.scoring
    how = {"tokens": count, "sequences": sequences, "cluster": run.config.cluster.shards_identity(), "dtype": scoring.dtype}
    how |= {"tf32": scoring.tf32}
    artifact = run.store.artifact("measured", how, inputs)
    with (
        adding_items(artifact),
        pool(
            run.parent.address, library, batches, run.config.cluster, artifact, run.progress, scoring.dtype, scoring.tf32
        ) as measure,
    ):
        yield measure


def work(run: Run, artifact: Artifact) -> None:
    own = setup(run)
    asked = run.config.search.model_copy(update={"limits": own.limits})
    chosen = choose(own, asked, scores.exact(run), lambda: measuring(run))
    if run.after is not None:
        chosen = replace(chosen, architecture=counted_from_original(chosen.architecture, own))
    save_choice(chosen, artifact)


def read(run: Run) -> Architecture:
    return Architecture.from_json(run.content("architecture").read(ARCHITECTURE))


def searched_scores(run: Run) -> Scores:
    """What the architecture was searched by: exact for all that it is made of."""
    return Scores.from_parquet(run.content("architecture").read(SCORES))


def measurements(run: Run) -> dict[str, Any] | None:
    """What was measured before the pick; None where nothing was."""
    artifact = run.content("architecture")
    return dict(artifact.read_json(PICKED)) if artifact.exists(PICKED) else None


def sources(run: Run) -> dict[str, str]:
    search = run.config.search
    if not search.measures:
        return searcher_sources([search.searcher])
    return searcher_sources([search.searcher, *search.rivals]) | tokens.parts(run).sources(pick=search.measure_tokens)


STAGE = Stage("architecture", work, inputs=("profile", "scores"), reads=("tokens",), settings=settings, sources=sources)
