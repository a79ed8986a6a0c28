"""Puzzle's own search: the exact best choice, by mixed-integer programming (arXiv 2411.19146 v5, section 4.3 and appendix B).

Presolve comes first. It drops dominated choices, bounds the objective by Lagrangian relaxation, and enumerates what is left.
Where too much is left, HiGHS solves the problem through python-mip, without the choices that presolve has excluded.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from puzzle_ray.errors import ConfigError, Infeasible, OutOfTime
from puzzle_ray.search.enumeration import Outcome, minimise
from puzzle_ray.search.problem import Choice, Floats, Limit, Problem, Solution, verified_solution
from puzzle_ray.search.relaxation import undominated

MAX_STATES = 400_000  # partial choices that presolve keeps; a problem that needs more goes to HiGHS
# HiGHS has absolute tolerances (1e-6). Limits are scaled to this range, and scores to this span.
ROW_SCALE = OBJECTIVE_SCALE = 1e4


def solve_exactly(
    problem: Problem, *, time_limit_s: float | None = None, presolve: bool = True, max_states: int = MAX_STATES
) -> Solution:
    """The choice of least objective within every limit. Its status is `optimal` with a proof, or `feasible` when time ran out.

    Raises Infeasible where there is no such choice, and OutOfTime where time ran out before one was found.
    """
    started = time.perf_counter()
    deadline = started + (math.inf if time_limit_s is None else time_limit_s)
    problem.check_each_limit()
    outcome, method = _minimise(problem, deadline, presolve, max_states)
    if outcome.choice is None and outcome.proven:
        raise _infeasible_together(problem, max_states)
    if outcome.choice is None:
        raise OutOfTime("search.time_limit_s", f"no architecture was found within {time_limit_s:g} s", "allow more time")
    bound = problem.objective(outcome.choice) if outcome.proven else outcome.bound
    status = "optimal" if outcome.proven else "feasible"
    return verified_solution(problem, outcome.choice, bound, status, time.perf_counter() - started, method)


def solve_diverse(
    problem: Problem, count: int, min_different_layers: int, *, time_limit_s: float | None = None
) -> list[Solution]:
    """Up to `count` choices. Each is the best of those that differ from all before it in at least `min_different_layers` layers.

    Fewer are returned where there are no more. `time_limit_s` is for each. Raises Infeasible where there is none.
    """
    solutions = [solve_exactly(problem, time_limit_s=time_limit_s)]
    while len(solutions) < count:
        problem = problem.apart_from(solutions[-1].choice, min_different_layers)
        try:
            solutions.append(solve_exactly(problem, time_limit_s=time_limit_s))
        except Infeasible:
            break
    return solutions


def _minimise(problem: Problem, deadline: float, presolve: bool, max_states: int) -> tuple[Outcome, str]:
    score, (rows, bounds) = problem.score, problem.rows()
    if not presolve:
        return _highs(score, rows, bounds, Outcome(None, -math.inf, False, np.isfinite(score)), deadline), "mip:HiGHS"
    binding = rows.max(axis=2).sum(axis=1) > bounds
    rows, bounds = rows[binding], bounds[binding]
    score = np.where(undominated(score, rows), score, np.inf)
    if not len(bounds):
        choice = score.argmin(axis=1)
        return Outcome(choice, problem.objective(choice), True, np.isfinite(score)), "presolve"
    outcome = minimise(score, rows, bounds, max_states, deadline)
    if outcome.proven or time.perf_counter() > deadline:
        return outcome, "presolve"
    return _highs(score, rows, bounds, outcome, deadline), "presolve+mip:HiGHS"


def _highs(score: Floats, rows: Floats, bounds: Floats, known: Outcome, deadline: float) -> Outcome:
    """Solves what presolve left: HiGHS through python-mip at gap 0, from the best known choice and bound."""
    import mip
    import mip.highs

    if not mip.highs.has_highs:
        raise ConfigError("search.searcher", "python-mip finds no HiGHS", "install it: pip install 'highspy<1.16'")
    live = [np.flatnonzero(alive) for alive in known.live]
    least = np.array([score[row, choices].min() for row, choices in enumerate(live)])
    spread = max(float(score[row, choices].max()) - least[row] for row, choices in enumerate(live)) or 1.0
    scale = OBJECTIVE_SCALE / spread
    model = mip.Model(sense=mip.MINIMIZE, solver_name=mip.HIGHS)
    model.verbose = 0
    model.max_mip_gap = model.max_mip_gap_abs = 0.0
    selected = [[model.add_var(var_type=mip.BINARY) for _ in choices] for choices in live]
    terms = [(row, v, x) for row, xs in enumerate(selected) for v, x in zip(live[row], xs, strict=True)]
    model.objective = mip.xsum(float(scale * (score[row, v] - least[row])) * x for row, v, x in terms)
    for xs in selected:
        model += mip.xsum(xs) == 1
    for coefficients, bound in zip(ROW_SCALE * rows, ROW_SCALE * bounds, strict=True):
        model += mip.xsum(float(coefficients[row, v]) * x for row, v, x in terms) <= float(bound)
    if known.choice is not None:
        model.start = [(x, float(v == known.choice[row])) for row, v, x in terms]
    return _optimised(model, selected, live, (score, rows, bounds), known, deadline, lambda z: z / scale + math.fsum(least))


def _optimised(
    model: Any,
    selected: list[list[Any]],
    live: list[Any],
    numbers: tuple[Floats, Floats, Floats],
    known: Outcome,
    deadline: float,
    unscaled: Any,
) -> Outcome:
    """Runs the model until its answer meets the limits exactly. An answer that meets only HiGHS' tolerance is excluded."""
    import mip

    score, rows, bounds = numbers
    layers, best, bound, excluded = np.arange(len(score)), known.choice, known.bound, 0
    while True:
        seconds = deadline - time.perf_counter()
        if excluded and seconds <= 0:
            return Outcome(best, bound, False, known.live)
        status = model.optimize(max_seconds=min(max(seconds, 1e-3), 1e9))
        if status in (mip.OptimizationStatus.INFEASIBLE, mip.OptimizationStatus.INT_INFEASIBLE):
            return Outcome(best, math.inf, True, known.live)
        bound = max(bound, unscaled(model.objective_bound)) if math.isfinite(model.objective_bound) else bound
        if not model.num_solutions:
            return Outcome(best, bound, False, known.live)
        picked = [max(range(len(xs)), key=lambda k: float(xs[k].x)) for xs in selected]
        choice: Choice = np.array([live[row][k] for row, k in enumerate(picked)], dtype=np.intp)
        if (rows[:, layers, choice].sum(axis=1) <= bounds).all():
            if best is None or score[layers, choice].sum() < score[layers, best].sum():
                best = choice
            return Outcome(best, bound, status == mip.OptimizationStatus.OPTIMAL, known.live)
        model += mip.xsum(xs[k] for xs, k in zip(selected, picked, strict=True)) <= len(selected) - 1
        excluded += 1


def _infeasible_together(problem: Problem, max_states: int) -> Infeasible:
    """The error where each limit can be met alone, but not all together. It names the limit that comes nearest while the others hold."""
    names = " and ".join(str(limit) for limit in problem.limits)
    nearest: tuple[float, Limit, float] | None = None
    for limit in problem.limits:
        finite = np.where(np.isfinite(problem.score), problem.costs[limit.cost], np.inf)
        outcome, _ = _minimise(problem.without_limit(limit, finite), time.perf_counter() + 5.0, True, max_states)
        if outcome.choice is not None and outcome.proven:
            spent = problem.spent(outcome.choice)[limit.cost]
            missed = (spent - limit.bound) / max(abs(limit.bound), 1e-12)
            if nearest is None or missed < nearest[0]:
                nearest = (missed, limit, spent)
    if nearest is None:
        first = problem.limits[0]
        best = first.reached(problem.cheapest(first.cost))
        return Infeasible(first.name, first.sense, first.asked, best, first.unit, f"each alone can be met, but not {names}")
    _, limit, spent = nearest
    note = f"each limit alone can be met, but not {names}; this is the best while the others hold"
    return Infeasible(limit.name, limit.sense, limit.asked, limit.reached(spent), limit.unit, note)
