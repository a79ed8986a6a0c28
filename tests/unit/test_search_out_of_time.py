"""A batch size whose search runs out of time: the others stand, nothing is called optimal that is not, and it is said."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
from report_inputs import CHOSEN
from report_inputs import SPACE as CHOSEN_SPACE
from search_inputs import SCENARIO, SCORES, SPACE, make_profile

from jobs import search_architecture, sweep_budgets
from puzzle_ray.artifacts import Architecture, Measured, to_json
from puzzle_ray.errors import Infeasible, OutOfTime
from puzzle_ray.report.page import ReportData, render
from puzzle_ray.search.budget import check_budget
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.mip import solve_exactly
from puzzle_ray.search.pick import PickOptions, pick
from puzzle_ray.search.searcher import Options
from puzzle_ray.search.searchers import mip
from puzzle_ray.search.setup import SearchSetup
from puzzle_ray.search.sweep import Grid, finish_sweep, grid_points, point_name, read_sweep, solved_points
from puzzle_ray.search.tables import Tables, search_architectures
from puzzle_ray.store import Store

PROFILE = make_profile(4, 8)
LIMITS = Limits(speedup=1.5)  # the parent's speed is that of batch size 4, and 8 is faster per token: it has the better answer
FIXED_MS = {
    size: Tables.of(SPACE, SCORES, make_profile(size), replace(SCENARIO, batch_size=size), "kl", LIMITS) for size in (4, 8)
}
FIXED_MS = {size: tables.tables[0].problem.constants[0] for size, tables in FIXED_MS.items()}


def find(limits=LIMITS, **more):
    return search_architectures(SPACE, SCORES, PROFILE, SCENARIO, limits, **more)


@pytest.fixture
def slow_at(monkeypatch):
    """Makes the search run out of time at some batch sizes, from the given answer of each on."""

    def slow(*sizes, from_answer=1):
        def solve(problem, **settings):
            problem.check_each_limit()
            answer = 1 + sum(name == "same_layers" for name in problem.cost_names)
            if answer >= from_answer and any(problem.constants[0] == FIXED_MS[size] for size in sizes):
                raise OutOfTime("search.time_limit_s", "no architecture was found within 60 s", "allow more time")
            return solve_exactly(problem, **settings)

        monkeypatch.setattr(mip, "solve_exactly", solve)

    return slow


def test_the_other_batch_sizes_stand_and_the_bound_holds_for_the_unsolved_one(slow_at):
    (best,) = find()
    assert (best.predicted.batch_size, best.status, best.unsolved_batch_sizes) == (8, "optimal", ())
    slow_at(8)
    (found,) = find()
    alone = Tables.of(SPACE, SCORES, PROFILE, SCENARIO, "kl", LIMITS)
    (at_four,) = replace(alone, tables=alone.tables[:1]).search(LIMITS)
    assert found.choices == at_four.architecture.choices and found.predicted.batch_size == 4
    assert (found.status, found.unsolved_batch_sizes) == ("feasible", (8,))
    assert found.bound <= best.objective < found.objective
    assert found.bound > 0, "the bound of the relaxation, not minus infinity"


def test_an_answer_that_the_unsolved_batch_size_cannot_beat_is_optimal(slow_at):
    slow_at(4)
    (found,) = find()
    assert (found.status, found.bound, found.unsolved_batch_sizes) == ("optimal", found.objective, (4,))


def test_out_of_time_everywhere_is_an_error_that_says_so(slow_at):
    slow_at(4, 8)
    with pytest.raises(OutOfTime, match=r"no architecture was found within 7 s at batch size 4, 8; allow more time"):
        find(time_limit_s=7.0)
    check_budget(SPACE, PROFILE, SCENARIO, LIMITS)  # nothing is known, so nothing is refused
    with pytest.raises(Infeasible):
        check_budget(SPACE, PROFILE, SCENARIO, Limits(speedup=50.0))  # no search is needed to know


def test_out_of_time_at_one_and_out_of_reach_at_the_other_is_out_of_time(slow_at):
    slow_at(8)
    with pytest.raises(OutOfTime, match="at batch size 8"):
        find(Limits(throughput_tokens_per_s=3000.0))


def test_a_further_answer_that_is_not_found_in_time_leaves_the_first_ones(slow_at):
    slow_at(4, 8, from_answer=3)
    assert len(find(count=5)) == 2
    tables = Tables.of(SPACE, SCORES, PROFILE, SCENARIO, "kl", LIMITS)

    def measure(children):
        return [Measured(sum(SCORES.value(i, c, "kl") for i, c in enumerate(x)), 0.0, 0.0, 1.0, 100) for x in children]

    architecture, report = pick(tables, LIMITS, PickOptions(count=5), Options(), measure)
    assert len(report["candidates"]) == 2 and "at batch size 4, 8" in report["left_out"]["mip #3"]
    assert architecture.status == "optimal"


def test_architectures_say_it_and_old_files_are_read(slow_at):
    slow_at(8)
    (found,) = find()
    again = Architecture.from_json(to_json(found))
    assert again == found and isinstance(again.unsolved_batch_sizes, tuple)
    assert "feasible" in search_architecture.describe(found, SPACE)
    assert "not solved in time: batch size 8" in search_architecture.describe(found, SPACE)
    assert "not solved in time" not in search_architecture.describe(CHOSEN, CHOSEN_SPACE)
    page = render(ReportData("p", architecture=replace(CHOSEN, status="feasible", bound=0.0, unsolved_batch_sizes=(8, 16))))
    assert "not solved in time: batch size 8, 16" in page
    old = json.loads(to_json(found))
    del old["unsolved_batch_sizes"]
    assert Architecture.from_json(json.dumps(old).encode()) == replace(found, unsolved_batch_sizes=())


def test_a_point_of_a_sweep_that_runs_out_of_time_is_a_point_with_a_reason(slow_at, tmp_path):
    slow_at(4)
    setup = SearchSetup(SPACE, SCORES, PROFILE, SCENARIO, "kl", "mip", 60.0, LIMITS)
    grid = Grid({(SCENARIO.input_tokens, SCENARIO.output_tokens): setup})
    points, step = grid_points({"batch_size": [4, 8], "speedup": [1.2, 50.0]}), Store(str(tmp_path)).artifact("sweep", {}, {})
    for point in points:
        step.write_json(point_name(point), grid.solve(point))
    found = solved_points(points, step)
    finish_sweep(found, step)
    assert list(read_sweep(step)) == found
    rows = list(csv.DictReader(io.StringIO(step.read("sweep.csv").decode())))
    assert [row["status"] for row in rows] == ["unsolved", "infeasible", "optimal", "infeasible"]
    assert "within 60 s at batch size 4" in rows[0]["unsolved_reason"] and not any(row["unsolved_reason"] for row in rows[1:])
    assert (step.facts()["unsolved"], step.facts()["infeasible"]) == (1, 2)
    assert "within 60 s at batch size 4" in sweep_budgets.line(found[0], 10)
    assert list(grid.choices_at(points)) == [found[2].architecture.choices]
