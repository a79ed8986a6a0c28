"""On Ray the library and the scores are those of one process, whatever dies on the way."""

import os
import signal
import threading
import time

import numpy as np
import pytest
import ray
import torch
from small_models import save_parent

from actors import library_stream, scoring_pool
from actors.placement import runs, trainer_groups
from puzzle_ray.blocks import load_stack, search_space
from puzzle_ray.checkpoint import read_config
from puzzle_ray.config import ClusterConfig, LibraryConfig, ScoringConfig
from puzzle_ray.data import Tokens
from puzzle_ray.distill.library import Library, build_serially
from puzzle_ray.errors import ClusterError
from puzzle_ray.families import describe
from puzzle_ray.progress import Quiet
from puzzle_ray.scoring.replace_one import score_serially
from puzzle_ray.store import Store

CONFIG = LibraryConfig(tokens=960, calibration_tokens=64, validation_tokens=64, micro_batch_tokens=32, checkpoint_every=4)
CLUSTER = ClusterConfig(num_shards=2, blocks_per_trainer=2, placement_timeout_s=60, step_timeout_s=60)
SPACE = (("gqa:1", "linear", "noop"), ("ffn:24", "noop"))


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = save_parent(tmp_path_factory.mktemp("parent"), num_hidden_layers=4)
    space = search_space(read_config(folder), *SPACE, 8)
    rng = np.random.default_rng(0)
    tokens = Tokens(rng.integers(0, 96, (64, 16), dtype=np.int32))
    store = Store(str(tmp_path_factory.mktemp("store")))
    torch.set_num_threads(1)
    serial = build_serially(str(folder), space, CONFIG, tokens, 0, store.step("library", {"by": "one process"}, {}), Quiet())
    return folder, space, tokens, store, serial


def assert_same(a: Library, b: Library) -> None:
    assert a.rows() == b.rows() and a.curves() == b.curves()
    for name in a.step.names():
        if name.endswith(".safetensors"):
            x, y = a.step.read_tensors(name)[0], b.step.read_tensors(name)[0]
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), name


class At(Quiet):
    """Calls `act` once, when `position` micro-batches are done."""

    def __init__(self, position, act):
        self.position, self.act, self.done = position, act, 0

    def stage(self, name, total, unit):
        from contextlib import contextmanager

        @contextmanager
        def opened():
            yield self

        return opened()

    def advance(self, count=1, **facts):
        self.done += count
        if self.done >= self.position and self.act:
            act, self.act = self.act, None
            act()


def build(setting, name, progress=None, **changes):
    folder, space, tokens, store, _ = setting
    step = store.step("library", {"by": name}, {})
    cluster = CLUSTER.model_copy(update=changes)
    return library_stream.build_library(str(folder), space, CONFIG, cluster, tokens, 0, step, progress or Quiet())


def test_the_library_equals_one_processes(local_ray, setting):
    assert_same(setting[-1], build(setting, "ray"))


def test_grouping_of_layers_changes_nothing(local_ray, setting):
    assert_same(setting[-1], build(setting, "one each", num_shards=1, blocks_per_trainer=4))


@pytest.mark.parametrize("victim", ["trainers", "shards"])
def test_killing_a_process_changes_nothing(local_ray, setting, victim, monkeypatch):
    streams = []
    start = library_stream._start
    monkeypatch.setattr(library_stream, "_start", lambda *a: streams.append(start(*a)) or streams[-1])
    killed = []

    def kill():
        pid = ray.get(getattr(streams[-1], victim)[0].pid.remote(), timeout=30)
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    library = build(setting, f"{victim} die", At(15, kill))
    assert len(killed) == 1
    assert_same(setting[-1], library)


def test_a_driver_that_is_stopped_continues_where_it_was(local_ray, setting):
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with pytest.raises(Stop):
        build(setting, "stopped", At(17, stop))
    seen = At(10**9, None)
    library = build(setting, "stopped", seen)
    assert_same(setting[-1], library)
    assert seen.done == 36  # 34 positions... counted from the checkpoint, shown as a whole


def test_scores_equal_one_processes(local_ray, setting):
    folder, space, tokens, store, library = setting
    config = ScoringConfig(granularity="block", tokens=64, micro_batch_tokens=32)
    model_config = read_config(folder)
    stack = load_stack(folder, describe(model_config), model_config, 0, 4, torch.float32)
    serial = score_serially(
        stack, tokens.first(64, 2), space, config, store.step("scores", {"by": "serial"}, {}), library.states, Quiet()
    )
    step = store.step("scores", {"by": "ray"}, {})
    on_ray = scoring_pool.score_blocks(str(folder), space, library.step, config, CLUSTER, tokens, step, Quiet())
    assert on_ray == serial


def test_killing_a_shard_while_scoring_changes_nothing(local_ray, setting, monkeypatch):
    folder, space, tokens, store, library = setting
    config = ScoringConfig(granularity="subblock", tokens=64, micro_batch_tokens=32)
    pipelines = []
    start = scoring_pool._Pipeline.start.__func__

    def started(cls, *args):
        pipelines.append(start(cls, *args))
        return pipelines[-1]

    monkeypatch.setattr(scoring_pool._Pipeline, "start", classmethod(started))

    def kill():
        os.kill(ray.get(pipelines[0].shards[-1].pid.remote(), timeout=30), signal.SIGKILL)

    def score(name, progress):
        return scoring_pool.score_blocks(
            str(folder), space, library.step, config, CLUSTER, tokens, store.step("scores", {"by": name}, {}), progress
        )

    assert score("killed", At(3, kill)) == score("undisturbed", Quiet())


def test_actors_that_find_no_place_are_an_error_that_says_what_there_is(local_ray, setting):
    with pytest.raises(ClusterError, match="did not start within 3 s; the cluster has .*CPU"):
        build(setting, "too big", cpus_per_trainer=64, placement_timeout_s=3.0)


def test_layers_are_spread_evenly_and_in_order(local_ray):
    assert [list(r) for r in runs(5, 2)] == [[0, 1], [2, 3, 4]] and len(runs(3, 8)) == 3
    assert trainer_groups([0, 2, 5], ClusterConfig(blocks_per_trainer=2)) == [[0, 2], [5]] or trainer_groups(
        [0, 2, 5], ClusterConfig(blocks_per_trainer=2)
    ) == [[0], [2, 5]]
    assert trainer_groups([0, 1, 2, 3, 4, 5, 6, 7], ClusterConfig(blocks_per_trainer="auto")) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_no_actor_outlives_its_stage(local_ray, setting):
    build(setting, "leaves nothing")
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]
    assert threading.active_count() < 50
