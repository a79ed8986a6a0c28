"""The sweep: the same search over a grid of budgets, and which answers no other one beats."""

from __future__ import annotations

from typing import Any

from jobs.run import Run, Stage
from jobs.stages import architecture, child, evaluation, gkd, scores, tokens
from puzzle_ray.search.searcher import searcher_sources
from puzzle_ray.search.sweep import Context, Grid, SweepPoint, grid_contexts, grid_points, read_sweep
from puzzle_ray.store import Artifact


def settings(run: Run) -> dict[str, Any]:
    search, config = run.config.search, run.config
    found = {"search": search.sweep_identity(), "memory": run.profile_config.memory()} | scores.identity(run)
    if search.sweep_gkd:
        found |= {"gkd": config.gkd.identity(), "evaluate": {"tokens": config.evaluate.tokens}}
    return found


def contexts(run: Run) -> dict[Context, Run]:
    """For every length of sequences that the grid asks for, the run that profiles it."""
    return {c: run.in_context(*c) for c in grid_contexts(run.config.search.grid, run.profile_config.scenario)}


def sources(run: Run) -> dict[str, str]:
    search = run.config.search
    found = {f"profile {c[0]}+{c[1]}": other.artifact("profile").key for c, other in contexts(run).items()}
    found |= searcher_sources([search.searcher])
    if search.sweep_measure:
        found |= tokens.parts(run).sources(pick=search.measure_tokens)
    if search.sweep_gkd:
        found |= tokens.parts(run).sources(test=run.config.evaluate.tokens)
    return found


def work(run: Run, artifact: Artifact) -> None:
    from actors.placement import cluster_cpus
    from actors.sweep import sweep
    from puzzle_ray.search.sweep import finish_sweep, solved_points, with_distilled, with_measured

    search, points = run.config.search, grid_points(run.config.search.grid)
    grid = _grid(run)
    make_exact = scores.exact(run)
    if make_exact is not None:
        exact = make_exact(scores.read(run), lambda seen: grid.with_scores(seen).choices_at(points))
        grid = grid.with_scores(exact)
    sweep(grid, points, artifact, cluster_cpus())
    found = solved_points(points, artifact)
    if search.sweep_measure:
        with architecture.measuring(run) as measure:
            found = with_measured(found, measure)
    if search.sweep_gkd:
        found = with_distilled(found, lambda c: evaluation.heldout_of(run, gkd.of(run, child.of(run, c))))
    finish_sweep(found, artifact)


def _grid(run: Run) -> Grid:
    """Setups of all contexts; what of them is not profiled yet is profiled first."""
    own = architecture.setup(run)
    setups = {}
    for context, other in contexts(run).items():
        other.done("profile")
        setups[context] = own if other is run else architecture.setup(other)
    return Grid(setups)


def read(run: Run) -> tuple[SweepPoint, ...]:
    return tuple(read_sweep(run.content("sweep")))


STAGE = Stage("sweep", work, inputs=("scores",), reads=("tokens", "profile"), settings=settings, sources=sources)
