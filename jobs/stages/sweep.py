"""The sweep: the same search over a grid of budgets, and which answers no other one beats."""

from __future__ import annotations

from typing import Any

from jobs.run import NotDone, Run, Stage
from jobs.stages import architecture, assembly, evaluation, gkd, scores, tokens
from puzzle_ray.artifacts import Choices
from puzzle_ray.search.searcher import searcher_sources
from puzzle_ray.search.sweep import Context, Grid, SweepPoint, grid_contexts, grid_points, read_sweep
from puzzle_ray.store import Artifact


def settings(run: Run) -> dict[str, Any]:
    search, config = run.config.search, run.config
    found = {"search": search.sweep_identity(), "memory": run.profile_config.memory()} | scores.identity(run)
    if search.sweep_gkd:
        found |= {"gkd": config.gkd.identity(), "evaluate": {"tokens": config.evaluate.tokens}}
    if search.sweep_rungs > 1:
        found |= {"rungs": search.sweep_rungs}
    if search.sweep_measure or search.sweep_gkd or search.sweep_rungs > 1:
        found |= config.data.mask_identity()
    return found


def contexts(run: Run) -> dict[Context, Run]:
    """For every length of sequences that the grid asks for, the run that profiles it."""
    return {c: run.in_context(*c) for c in grid_contexts(run.config.search.grid, run.profile_config.scenario)}


def sources(run: Run) -> dict[str, str]:
    search = run.config.search
    found = {f"profile {c[0]}+{c[1]}": other.artifact("profile").key for c, other in contexts(run).items()}
    found |= searcher_sources(search.searcher)
    picked = [search.measure_tokens] * search.sweep_measure + [run.config.gkd.heldout_tokens] * (search.sweep_rungs > 1)
    if picked:
        found |= tokens.parts(run).sources(pick=max(picked))
    if search.sweep_gkd:
        found |= tokens.parts(run).sources(test=run.config.evaluate.tokens)
    return found


def foreseen(run: Run) -> None:
    """Raises ClusterError where one CPU would evaluate a parent that is larger than a GPU, before children are distilled."""
    try:
        finished = run.artifact(STAGE.name).finished
    except NotDone:
        finished = False
    if run.config.search.sweep_gkd and not finished:
        evaluation.check_who_evaluates(run)


def work(run: Run, artifact: Artifact) -> None:
    from actors.placement import cluster_cpus
    from actors.sweep import sweep
    from puzzle_ray.search.rivals import all_choices
    from puzzle_ray.search.sweep import finish_sweep, frontier_choices, solved_points, with_distilled, with_measured

    search, points = run.config.search, grid_points(run.config.search.grid)
    grid = _grid(run)
    make_exact = scores.exact(run)
    if make_exact is not None:
        count, apart = search.candidates if search.sweep_rungs > 1 else 1, search.min_different_layers
        exact = make_exact(scores.read(run), lambda seen: all_choices(grid.with_scores(seen), points, count, apart))
        grid = grid.with_scores(exact)
    sweep(grid, points, artifact, cluster_cpus())
    found = solved_points(points, artifact)
    if search.sweep_rungs > 1:
        found = _climbed(run, grid, found, artifact)
    if search.sweep_measure:
        with architecture.measuring(run) as measure:
            found = with_measured(found, measure)
    if search.sweep_gkd:
        stopped = {choices for choices, point in frontier_choices(found).items() if point.stopped}
        distil = lambda c: None if c in stopped else evaluation.heldout_of(run, gkd.of(run, assembly.of(run, c)))  # noqa: E731
        found = with_distilled(found, distil)
    finish_sweep(found, artifact)


def _climbed(run: Run, grid: Grid, found: list[SweepPoint], artifact: Artifact) -> list[SweepPoint]:
    """The points on the frontier with the children that distil best within their budgets; all of them are distilled side by side."""
    from actors.distil_sweep import distil_children
    from actors.placement import cluster_cpus, node_cpus
    from puzzle_ray.distill.rungs import Climber, to_json
    from puzzle_ray.search.rivals import asked, rivals, with_best

    search = run.config.search
    front = {i: point for i, point in enumerate(found) if point.on_frontier}
    within = {i: rivals(grid, point, search.candidates, search.min_different_layers) for i, point in front.items()}
    climbers: dict[Choices, Climber] = {}
    for i, point in sorted(
        front.items(), key=lambda item: asked(item[1]), reverse=True
    ):  # of equals, the strictest budget's stays
        for rival in within[i]:
            costs = rival.predicted
            facts = {"speedup": rival.predicted_speedup, "num_params": costs.num_params, "memory_mib": costs.memory_mib}
            source = assembly.of(run, rival.choices)
            job = gkd.job_of(run, source, gkd.artifact_of(run, source))
            climbers[rival.choices] = Climber(job, point.label, asked(point), point.scenario, facts)
    if not climbers:
        return found
    cpus = max(1, min(node_cpus(), cluster_cpus() // len(climbers)))
    how: dict[str, Any] = {"cpus": cpus, "cluster": run.config.cluster, "progress": run.progress}
    by_name, _ = distil_children(list(climbers.values()), search.sweep_rungs, artifact, **how)
    rows = {choices: [to_json(row) for row in by_name[climber.name]] for choices, climber in climbers.items()}
    return [with_best(point, within[i], rows) if i in within else point for i, point in enumerate(found)]


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


STAGE = Stage(
    "sweep", work, inputs=("scores",), reads=("tokens", "profile"), settings=settings, sources=sources, foreseen=foreseen
)
