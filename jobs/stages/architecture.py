"""The architecture: one variant per layer, least damage within the budget; picked by measurement where asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jobs.run import Run, Stage
from jobs.stages import assembly, gkd, profile, scores, tokens
from puzzle_ray.artifacts import Architecture, Choices, Measure, Scores
from puzzle_ray.search.choose import ARCHITECTURE, SCORES, choose, save_choice
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.pick import PICKED
from puzzle_ray.search.rounds import counted_from_original, limits_of_round
from puzzle_ray.search.searcher import searcher_sources
from puzzle_ray.search.setup import SearchSetup
from puzzle_ray.store import Artifact, adding_items
from puzzle_ray.version import torch_series

if TYPE_CHECKING:
    from actors.child_meter import ChildMeters
    from puzzle_ray.distill.rungs import Climber


def settings(run: Run) -> dict[str, Any]:
    rounds = {"round": [run.number, run.config.rounds]} if run.config.rounds > 1 else {}
    found: dict[str, Any] = {"search": run.config.search.identity(), "memory": run.profile_config.memory()}
    if run.config.search.distils:
        found |= {"gkd": run.config.gkd_before_pick.identity(), "torch": torch_series()}
    mask = run.config.data.mask_identity() if run.config.search.measures else {}
    return found | scores.identity(run) | rounds | mask


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
def measuring(run: Run) -> Iterator[ChildMeters]:
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
    how |= {"tf32": scoring.tf32} | run.config.data.mask_identity()
    artifact = run.store.artifact("measured", how, inputs)
    with (
        adding_items(artifact),
        pool(
            run.parent.address,
            library,
            batches,
            run.config.cluster,
            artifact,
            run.progress,
            scoring.dtype,
            scoring.tf32,
            parts.pick.separator,
        ) as measure,
    ):
        yield measure


def _climbers(run: Run, children: Sequence[Choices]) -> list[Climber]:
    """Candidates to be distilled, as the config has it of those before the pick."""
    from puzzle_ray.distill.rungs import Climber

    config, climbers = run.config.gkd_before_pick, []
    for number, choices in enumerate(children, 1):
        source = assembly.of(run, choices)
        job = gkd.job_of(run, source, gkd.artifact_of(run, source, config), config)
        climbers.append(Climber(job, f"candidate {number}", (), (), {}))
    return climbers


def _distilled(run: Run, children: Sequence[Choices], artifact: Artifact) -> list[float]:
    """Candidates' held-out KLs after a short distillation, side by side, each in one process with as many threads as without Ray."""
    from actors.distil_sweep import distil_children
    from actors.placement import node_cpus

    climbers, cpus = _climbers(run, children), max(1, node_cpus() // run.config.gkd.num_workers)
    distil_children(climbers, 1, artifact, cpus=cpus, cluster=run.config.cluster, progress=run.progress)
    return [float(climber.job.artifact.facts()["heldout_kl"]) for climber in climbers]


def _raced(run: Run, children: Sequence[Choices], artifact: Artifact) -> list[list[dict[str, Any]]]:
    """What candidates were at every rung of a race. Each begins the distillation that stage `gkd` would give it, side by side with the
    others, in one process with as many threads as each worker there."""
    from actors.distil_sweep import race_children
    from actors.gkd import equal_share
    from puzzle_ray.distill.rungs import to_json

    gkd_config, climbers = run.config.gkd, _climbers(run, children)
    how: dict[str, Any] = {"cluster": run.config.cluster, "progress": run.progress, "cpus": equal_share(gkd_config.num_workers)}
    rows = race_children(climbers, gkd_config.race_steps(run.config.search.race_rungs), artifact, **how)
    return [[to_json(row) for row in rows[climber.name]] for climber in climbers]


def work(run: Run, artifact: Artifact) -> None:
    own = setup(run)
    asked = run.config.search.model_copy(update={"limits": own.limits})
    meters: list[ChildMeters] = []

    @contextmanager
    def kept_at_hand() -> Iterator[Measure]:
        with measuring(run) as meter:
            meters.append(meter)
            yield meter

    def close_meters() -> None:
        """Their shards have the CPUs that distillation needs, and start again where more is measured."""
        for meter in meters:
            meter.close()

    def distilled(children: Sequence[Choices]) -> list[float]:
        close_meters()
        return _distilled(run, children, artifact)

    def race(children: Sequence[Choices]) -> list[list[dict[str, Any]]]:
        close_meters()
        return _raced(run, children, artifact)

    chosen = choose(own, asked, scores.exact(run), kept_at_hand, distilled, race)
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
        return searcher_sources(search.searcher)
    read = max(search.measure_tokens, run.config.gkd.heldout_tokens if search.distils else 0)
    found = searcher_sources(search.searcher, search.rivals) | tokens.parts(run).sources(pick=read)
    return found | (tokens.train_source(run) | gkd.original_source(run) if search.distils else {})


def foreseen(run: Run) -> None:
    """Raises ConfigError for what a race is refused for, which begins the distillation of the run."""
    if run.config.search.race_rungs:
        gkd.check_lengths(run)


STAGE = Stage(
    "architecture", work, inputs=("profile", "scores"), reads=("tokens",), settings=settings, sources=sources, foreseen=foreseen
)
