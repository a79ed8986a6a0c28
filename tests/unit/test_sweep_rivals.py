"""Rivals within a budget: they keep it, differ, and the one that distils best is taken."""

import pytest
from search_inputs import SCENARIO, SCORES, SPACE, make_profile

from puzzle_ray.config import validated
from puzzle_ray.errors import ConfigError
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.rivals import all_choices, asked, rivals, with_best
from puzzle_ray.search.setup import SearchSetup
from puzzle_ray.search.sweep import Grid, finish_sweep, grid_points, point_name, read_sweep, solved_points, table_row
from puzzle_ray.store import Store

AXES = {"speedup": [1.2, 1.5], "memory_mib": [12.0]}


@pytest.fixture
def grid():
    setup = SearchSetup(SPACE, SCORES, make_profile(4, 8), SCENARIO, "kl", "mip", 60.0, Limits(speedup=1.5))
    return Grid({(SCENARIO.input_tokens, SCENARIO.output_tokens): setup})


@pytest.fixture
def points(grid, tmp_path):
    step = Store(str(tmp_path)).artifact("sweep", {}, {})
    for point in grid_points(AXES):
        step.write_json(point_name(point), grid.solve(point))
    return solved_points(grid_points(AXES), step)


def test_rivals_keep_the_budget_and_differ(grid, points):
    for point in points:
        found = rivals(grid, point, 3, 2)
        assert found[0] is point.architecture and len(found) == 3
        for number, rival in enumerate(found):
            assert rival.predicted_speedup >= point.budget["speedup"] - 1e-9
            assert rival.predicted.memory_mib <= point.budget["memory_mib"] + 1e-9
            for other in found[:number]:
                assert sum(a != b for a, b in zip(rival.choices, other.choices, strict=True)) >= 2
                assert rival.objective >= other.objective
    assert rivals(grid, points[0], 1, 1) == [points[0].architecture]
    assert asked(points[1]) == (-1.5, 12.0) < asked(points[0]) == (-1.2, 12.0)
    known = set(all_choices(grid, grid_points(AXES), 3, 2))
    assert known >= {rival.choices for point in points for rival in rivals(grid, point, 3, 2)}


def rows(*kls, ended=False):
    return [
        {"rung": i + 1, "step": i, "tokens": 10 * (i + 1), "kl": kl, "goes_on": not (ended and i == len(kls) - 1)}
        for i, kl in enumerate(kls)
    ]


def test_the_one_that_comes_furthest_with_the_least_kl_is_taken(grid, points, tmp_path):
    first, second, third = found = rivals(grid, points[0], 3, 1)
    climbed = {first.choices: rows(0.5, 0.4), second.choices: rows(0.5, 0.3), third.choices: rows(0.1, ended=True)}
    best = with_best(points[0], found, climbed)
    assert best.architecture.choices == second.choices and best.architecture.objective == second.objective
    assert best.architecture.bound <= first.bound and best.architecture.status == "measured" and not best.stopped
    assert [rival["objective"] for rival in best.rivals] == [first.objective, third.objective]
    row = table_row(best)
    assert (row["distilled_tokens"], row["rung_kl"], row["stopped"], row["rivals"]) == (20, 0.3, False, 2)
    climbed = {first.choices: rows(0.2, ended=True), second.choices: rows(0.3, ended=True), third.choices: rows(0.4, ended=True)}
    ended = with_best(points[0], found, climbed)
    assert ended.architecture == first and ended.stopped and table_row(ended)["stopped"]
    step = Store(str(tmp_path / "written")).artifact("sweep", {}, {})
    finish_sweep([best, ended, points[1]], step)
    assert list(read_sweep(step)) == [best, ended, points[1]]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"search": {"sweep_rungs": 3}}, "sweep_rungs=3 is about distilled children; set search.sweep_gkd=true"),
        ({"search": {"sweep_rungs": 2, "sweep_gkd": True}, "gkd": {"heldout_tokens": 0}}, "gkd.heldout_tokens is 0"),
        ({"search": {"without": ["liner"], "candidates": 2}}, "search.without names 'liner', which space does not have.*linear"),
        ({"search": {"distil_tokens": 64}}, "distil_tokens compares candidates, and there is one; set search.candidates"),
        (
            {"search": {"distil_tokens": 64, "candidates": 2}, "gkd": {"heldout_tokens": 0}},
            "set gkd.heldout_tokens, or leave out",
        ),
        (
            {"search": {"distil_tokens": 64, "candidates": 2}, "gkd": {"tokens": 0}},
            "gkd.tokens is 0; set gkd.tokens, or leave out",
        ),
        (
            {"search": {"distil_tokens": 64, "candidates": 2}, "gkd": {"parallel": "fsdp"}},
            "set search.distil_tokens to 0, or gkd",
        ),
    ],
)
def test_rungs_that_compare_nothing_are_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        validated({"parent": "somewhere", "store": "here"} | values)
