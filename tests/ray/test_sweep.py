"""Sweeps by Tune and children measured by workers: the same as in one process, resumed without doing anything twice."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from s3_server import s3_bucket
from search_inputs import SCENARIO, SCORES, SPACE, make_profile
from small_models import save_parent

from actors.child_meter import file_name, measuring
from actors.sweep import solve_points, sweep
from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.data.order import Tokens
from puzzle_ray.distill.library import build_serially
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.errors import ClusterError, ConfigError, ProfileError
from puzzle_ray.evaluation.child_meter import ChildMeter
from puzzle_ray.models.blocks import load_stack
from puzzle_ray.models.child import read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.progress import Quiet
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.setup import SearchSetup
from puzzle_ray.search.sweep import Grid, finish_sweep, grid_points, point_name, read_sweep, solved_points, unsolved_points
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

AXES = {"speedup": [1.1, 1.3, 1.5, 2.0, 9.0], "memory_mib": [6.0, 10.0, 14.0]}


@pytest.fixture
def grid():
    setup = SearchSetup(SPACE, SCORES, make_profile(4), SCENARIO, "kl", "mip", 60.0, Limits(speedup=1.5))
    return Grid({(SCENARIO.input_tokens, SCENARIO.output_tokens): setup})


@pytest.fixture
def told():
    """A grid that writes into every point which trial solved it. Its class is local: trials cannot import this module."""

    class Told(Grid):
        def solve(self, point):
            from ray import tune

            return super().solve(point) | {"distilled": {"trial": tune.get_context().get_trial_id()}}

    return Told


def trials_of(points, step):
    return {step.read_json(point_name(point))["distilled"]["trial"] for point in points}


def untimed(point):
    raw = asdict(point)
    if raw["architecture"]:
        raw["architecture"].pop("solve_s")
    return raw


def test_a_sweep_by_tune_gives_what_one_process_gives(local_ray, grid, tmp_path):
    points = grid_points(AXES)
    by_tune, alone = (Store(str(tmp_path)).artifact("sweep", {"by": name}, {}) for name in ("tune", "loop"))
    sweep(grid, points, by_tune, 2)
    assert len(solve_points(grid, points, alone)) == len(points)
    found = solved_points(points, by_tune)
    assert list(map(untimed, found)) == list(map(untimed, solved_points(points, alone)))
    finish_sweep(found, by_tune)
    assert list(read_sweep(by_tune)) == found and {"sweep.csv", "sweep.parquet", "sweep.json"} <= set(by_tune.names())
    assert not list(tmp_path.rglob("*.pkl")) and not by_tune.exists("tune"), "what Tune itself writes goes with the run"


def test_a_trial_solves_several_points(local_ray, grid, tmp_path, told):
    step, points = Store(str(tmp_path)).artifact("sweep", {}, {}), grid_points(AXES)
    sweep(told(grid.setups), points, step, 4)
    assert len(trials_of(points, step)) == 2


def test_a_sweep_that_was_broken_off_goes_on(local_ray, grid, tmp_path):
    """Solved points stay as they are; what is missing is solved."""
    step, points = Store(str(tmp_path)).artifact("sweep", {}, {}), grid_points(AXES)
    sweep(grid, points[:6], step, 1)
    marked = step.read_json(point_name(points[0])) | {"measured_kl": 123.0}
    step.write_json(point_name(points[0]), marked)
    step.remove(point_name(points[4]))
    sweep(grid, points, step, 2)
    assert unsolved_points(points, step) == [] and solved_points(points, step)[0].measured_kl == 123.0


def test_a_sweep_that_does_not_end_in_time_is_an_error(local_ray, grid, tmp_path, monkeypatch):
    class Stuck(Grid):
        def solve(self, point):
            time.sleep(600)

    monkeypatch.setattr("actors.sweep.START_S", 0.5)
    context, setup = next(iter(grid.setups.items()))
    stuck = Stuck({context: replace(setup, time_limit_s=0.01)})
    with pytest.raises(ClusterError, match="15 of 15 points were not solved within 1 s"):
        sweep(stuck, grid_points(AXES), Store(str(tmp_path)).artifact("sweep", {}, {}), 1)


def test_what_a_failed_trial_did_not_solve_is_done_by_the_next_run(local_ray, grid, tmp_path, told):
    step, points = Store(str(tmp_path)).artifact("sweep", {}, {}), grid_points(AXES)

    class Breaks(told):
        def solve(self, point):
            if point == points[7]:
                raise OSError("a fault")
            return super().solve(point)

    with pytest.raises(ClusterError, match="a trial failed: .*a fault"):
        sweep(Breaks(grid.setups), points, step, 1)
    assert unsolved_points(points, step) == points[7:]
    first = trials_of(points[:7], step)
    sweep(told(grid.setups), points, step, 3)
    assert unsolved_points(points, step) == []
    assert trials_of(points[:7], step) == first and trials_of(points[7:], step).isdisjoint(first), "nothing is solved twice"


def test_a_trial_s_own_error_is_told_as_it_is(local_ray, grid, tmp_path):
    step, (context, setup) = Store(str(tmp_path)).artifact("sweep", {}, {}), next(iter(grid.setups.items()))
    with pytest.raises(ConfigError, match="search.searcher: searcher 'puzzle_ray.nowhere:SEARCHER' cannot be imported"):
        sweep(Grid({context: replace(setup, searcher="puzzle_ray.nowhere:SEARCHER")}), grid_points(AXES), step, 1)


def test_a_sweep_in_a_store_that_only_this_process_sees(local_ray, grid, told):
    step, points = Store(f"memory://sweep-{time.time_ns()}").artifact("sweep", {}, {}), grid_points(AXES)
    sweep(told(grid.setups), points[:4], step, 1)
    first = trials_of(points[:4], step)
    sweep(told(grid.setups), points, step, 2)
    assert unsolved_points(points, step) == [] and trials_of(points[:4], step) == first


def test_points_on_an_object_store(grid):
    with s3_bucket() as bucket:
        step, points = Store(f"{bucket}/{time.time_ns()}").artifact("sweep", {}, {}), grid_points(AXES)
        assert len(solve_points(grid, points[:4], step)) == 4
        assert list(solve_points(grid, points, step)) == [point_name(point) for point in points[4:]], "nothing is solved twice"
        there = {name.partition("/")[0] for name in step.store.sizes(step.url)}
        assert {name for name in there if not name.startswith(".")} == {"points"}


def test_a_point_that_was_not_profiled_is_refused_before_any_trial(local_ray, grid, tmp_path):
    step = Store(str(tmp_path)).artifact("sweep", {}, {})
    with pytest.raises(ProfileError, match="16 was not profiled"):
        sweep(grid, grid_points({"speedup": [1.5], "batch_size": [16]}), step, 1)
    assert not step.names()


def test_workers_measure_what_one_process_measures_and_nothing_twice(local_ray, tmp_path):
    parent = save_parent(tmp_path / "parent")
    config = read_config(parent)
    space = search_space(config, ("parent", "gqa:1"), ("parent", "noop"), 8)
    tokens = Tokens(np.random.default_rng(0).integers(0, 96, (64, 16), dtype=np.int32))
    store = Store(str(tmp_path / "store"))
    settings = LibraryConfig(tokens=128, calibration_tokens=64, validation_tokens=64, micro_batch_tokens=64)
    library = build_serially(str(parent), space, settings, tokens, 0, store.artifact("library", {}, {}), Quiet())
    batches = tokens.first(64, 2)
    a, b = LayerChoice("gqa:1", "noop"), LayerChoice("parent", "noop")
    parents = LayerChoice()
    children = [(a, b, parents), (parents, a, a), (a, b, parents), (parents, parents, parents)]
    step = store.artifact("measured", {}, {})
    ids, separator = [x.numpy() for x in batches], int(batches[0][0, 7])  # so that a row has two documents
    with measuring(str(parent), library.artifact, ids, ClusterConfig(), step, Quiet(), separator=separator) as measure:
        found = measure(children)
        assert measure(children[:1]) == found[:1]
    torch.set_num_threads(1)
    stack = load_stack(parent, describe(config), config, 0, config.num_hidden_layers, torch.float32)
    assert found == [ChildMeter(stack, library, batches, separator=separator).measure(child) for child in children]
    assert len(step.names("children")) == 3

    name = file_name(children[1])
    step.write(name, json.dumps(step.read_json(name) | {"measured": asdict(found[0])}).encode())
    with measuring(str(parent), library.artifact, [], ClusterConfig(), step, Quiet()) as measure:
        assert measure(children) == [found[0], found[0], found[0], found[3]], "files are read, no worker starts"
        assert measure.pipelines is None
