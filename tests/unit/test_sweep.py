"""Grids of budgets: points, setups, the Pareto frontier, tables."""

from __future__ import annotations

import csv
import io

import pyarrow.parquet as pq
import pytest
from search_inputs import LAYERS, SCENARIO, SCORES, SPACE, make_profile

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.errors import ConfigError, ProfileError
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.search.limits import FixedChoice, Limits
from puzzle_ray.search.settings import SearchConfig
from puzzle_ray.search.setup import SearchSetup
from puzzle_ray.search.sweep import (
    Grid,
    finish_sweep,
    grid_contexts,
    grid_points,
    longest_context,
    point_name,
    read_sweep,
    solved_points,
    table_row,
    unsolved_points,
    with_distilled,
    with_measured,
)
from puzzle_ray.store import Store

CONTEXT = (SCENARIO.input_tokens, SCENARIO.output_tokens)


def make_grid(limits=Limits(speedup=1.5)) -> Grid:  # noqa: B008  (frozen)
    setup = SearchSetup(SPACE, SCORES, make_profile(4, 8), SCENARIO, "kl", "mip", 60.0, limits)
    return Grid({CONTEXT: setup})


def swept(tmp_path, sweep, grid=None):
    step, grid = Store(str(tmp_path)).artifact("sweep", sweep, {}), grid or make_grid()
    points = grid_points(sweep)
    for point in unsolved_points(points, step):
        step.write_json(point_name(point), grid.solve(point))
    return solved_points(points, step), step


def test_points_are_all_combinations_in_order():
    assert grid_points({"speedup": [2.0, 1.5], "batch_size": [8, 4]}) == [
        {"speedup": 1.5, "batch_size": 4},
        {"speedup": 1.5, "batch_size": 8},
        {"speedup": 2.0, "batch_size": 4},
        {"speedup": 2.0, "batch_size": 8},
    ]
    assert grid_contexts({"input_tokens": [16, 32]}, SCENARIO) == [(16, 11), (32, 11)]


def test_every_answer_keeps_its_budget_and_what_is_fixed(tmp_path):
    fixed = Limits(speedup=9.0, fixed={0: FixedChoice(attention="parent", ffn="parent")})
    points, _ = swept(tmp_path, {"speedup": [1.2, 1.5], "memory_mib": [8.0, 12.0]}, make_grid(fixed))
    assert len(points) == 4
    for point in points:
        found = point.architecture
        assert found.predicted_speedup >= point.budget["speedup"] - 1e-9
        assert found.predicted.memory_mib <= point.budget["memory_mib"] + 1e-9
        assert found.choices[0] == LayerChoice()
        assert point.label == f"{point.budget['speedup']:g} x, memory_mib {point.budget['memory_mib']:g}"


def test_a_point_at_one_batch_size_is_compared_with_the_parent_there(tmp_path):
    points, _ = swept(tmp_path, {"speedup": [1.0, 1.3], "batch_size": [4, 8]})
    for point in points:
        assert (
            point.architecture.predicted.batch_size
            == point.architecture.parent_predicted.batch_size
            == point.budget["batch_size"]
        )
    assert points[0].architecture.choices == points[1].architecture.choices == (LayerChoice(),) * LAYERS


def test_no_answer_beats_another_on_the_frontier_and_every_other_is_beaten(tmp_path):
    points, _ = swept(tmp_path, {"speedup": [1.1, 1.2, 1.21, 1.4, 1.8, 2.5, 50.0], "memory_mib": [4.0, 8.0, 12.5]})

    def values(p):
        costs = p.architecture.predicted
        return p.architecture.objective, -costs.throughput_tokens_per_s, costs.memory_mib

    there = [p for p in points if p.architecture]
    front = {values(p) for p in there if p.on_frontier}
    assert len(front) == sum(p.on_frontier for p in points)
    for point in there:
        own = values(point)
        beaten = any(all(a <= b for a, b in zip(values(o), own, strict=True)) and values(o) != own for o in there)
        assert beaten == (own not in front)
    assert any(p.infeasible_reason for p in points) and not any(p.on_frontier for p in points if not p.architecture)


def test_the_frontier_is_distilled_once_per_architecture(tmp_path):
    points, _ = swept(tmp_path, {"speedup": [1.2, 1.5, 1.5001, 9.0]})
    asked = []

    def distil(choices):
        asked.append(choices)
        return {"kl": float(len(asked)), "heldout_loss": 2.0}

    found = with_distilled(points, distil)
    assert len(asked) == len(set(asked)) == len({p.architecture.choices for p in points if p.on_frontier})
    for before, after in zip(points, found, strict=True):
        assert (after.distilled is not None) == before.on_frontier
        assert table_row(after)["distilled_kl"] == (1.0 + asked.index(after.architecture.choices) if after.on_frontier else None)


def test_tables_say_the_same_as_the_points(tmp_path):
    points, step = swept(tmp_path, {"speedup": [1.2, 50.0]})

    class Found:
        kl = 0.25

    points = with_measured(points, lambda children: [Found() for _ in children])
    finish_sweep(points, step)
    assert list(read_sweep(step)) == points and points[0].measured_kl == 0.25 and points[1].measured_kl is None
    rows = list(csv.DictReader(io.StringIO(step.read("sweep.csv").decode())))
    table = pq.read_table(io.BytesIO(step.read("sweep.parquet"))).to_pylist()
    assert [float(row["asked_speedup"]) for row in rows] == [row["asked_speedup"] for row in table] == [1.2, 50.0]
    assert table[0]["objective"] == points[0].architecture.objective and table[1]["objective"] is None
    assert rows[1]["status"] == table[1]["status"] == "infeasible" and "best reachable" in table[1]["infeasible_reason"]


def test_what_was_not_profiled_is_refused():
    grid = make_grid()
    with pytest.raises(ProfileError, match="16 was not profiled; profiled: 4, 8"):
        grid.setup({"speedup": 2.0, "batch_size": 16})
    with pytest.raises(ConfigError, match="99 tokens in and 11 out were not profiled"):
        grid.setup({"speedup": 2.0, "input_tokens": 99})
    profile = ProfileConfig(scenario=SCENARIO)
    with pytest.raises(ConfigError, match="8 is not profiled; add it to profile.batch_sizes"):
        longest_context({"batch_size": (4.0, 8.0)}, profile)
    assert longest_context({"input_tokens": (20.0, 100.0)}, profile) == 111


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"speed": [1.5]}, "did you mean 'speedup'"),
        ({"batch_size": [4]}, "no budget"),
        ({"speedup": [1.5], "batch_size": [2.5]}, "whole numbers"),
        ({"speedup": None}, "no budget"),
    ],
)
def test_grids_that_make_no_sense_are_refused(sweep, message):
    with pytest.raises(ValueError, match=message):
        SearchConfig(sweep=sweep)


def test_an_axis_can_be_switched_off():
    assert SearchConfig(sweep={"speedup": None, "memory_mib": [10]}).grid == {"memory_mib": (10.0,)}
