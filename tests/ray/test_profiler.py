"""On Ray the profile covers what one process' covers, whatever dies on the way, and nothing is measured twice."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from small_models import save_parent

from actors.pool import Pool
from actors.profiler import profile_blocks
from puzzle_ray.artifacts import Profile, Scenario
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.errors import ClusterError, ProfileError
from puzzle_ray.models.child import read_config
from puzzle_ray.profiling.measure import PROFILE_TABLE, num_runs, profile_serially, profile_tasks
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

CONFIG = ProfileConfig(scenario=Scenario(2, 6, 3), batch_sizes=(1, 4), repeats=2, stack=1)
CLUSTER = ClusterConfig(placement_timeout_s=300, step_timeout_s=300)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = save_parent(tmp_path_factory.mktemp("parent"))
    return str(folder), search_space(read_config(folder), ("gqa:1", "noop"), ("ffn:24", "noop"), 8)


class Heard(Quiet):
    """Follows the bar; calls `act` once, when `position` runs are done."""

    def __init__(self, position=10**9, act=None):
        self.position, self.act, self.total, self.done, self.steps = position, act, 0, 0, []

    def stage(self, name, total, unit):
        from contextlib import nullcontext

        self.total = total
        return nullcontext(self)

    def advance(self, count=1, **facts):
        self.done += count
        self.steps.append(count)
        if self.done >= self.position and self.act:
            act, self.act = self.act, None
            act()


def without_times(profile: Profile):
    times = ("prefill_ms", "decode_ms", "prefill_spread_ms", "decode_spread_ms")
    return [replace(row, **dict.fromkeys(times, 0.0)) for row in profile.rows]


@pytest.fixture
def pools(monkeypatch):
    """The pools that were started."""
    started = []
    start = Pool.start
    monkeypatch.setattr(Pool, "start", lambda pool, count: started.append(pool) or start(pool, count))
    return started


def test_the_profile_covers_what_one_processes_does(local_ray, setting, tmp_path):
    folder, space = setting
    store, heard = Store(str(tmp_path)), Heard()
    serial = profile_serially(
        read_config(Path(folder)), space, CONFIG, store.artifact("profile", {"by": "one process"}, {}), Quiet()
    )
    step = store.artifact("profile", {"by": "ray"}, {})
    on_ray = profile_blocks(folder, space, CONFIG, CLUSTER, step, heard)
    assert without_times(on_ray) == without_times(serial)
    assert Profile.from_parquet(step.read(PROFILE_TABLE)) == on_ray and step.finished
    assert heard.done == heard.total == sum(num_runs(item, CONFIG) for item in profile_tasks(space, CONFIG))
    assert on_ray.device.endswith(f"{int(ray.cluster_resources()['CPU'])} threads")  # the whole node is the profiler's


@pytest.mark.wide  # a killed profiler and a killed run from end to end are in the plain tests
def test_a_driver_that_is_stopped_measures_only_the_rest(local_ray, setting, tmp_path):
    folder, space = setting
    step = Store(str(tmp_path)).artifact("profile", {}, {})
    each = num_runs(profile_tasks(space, CONFIG)[0], CONFIG)

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with pytest.raises(Stop):
        profile_blocks(folder, space, CONFIG, CLUSTER, step, Heard(each, stop))
    (done,) = step.names("items")
    before = step.read(f"items/{done}")
    heard = Heard()
    profile_blocks(folder, space, CONFIG, CLUSTER, step, heard)
    assert heard.steps[0] == each and heard.done == 3 * each
    assert step.read(f"items/{done}") == before and len(step.names("items")) == 3


def test_killing_a_profiler_loses_at_most_the_item_it_was_at(local_ray, setting, tmp_path, pools):
    folder, space = setting
    step = Store(str(tmp_path)).artifact("profile", {}, {})
    long = CONFIG.model_copy(update={"batch_sizes": (1,), "repeats": 200})  # so that it dies in the middle of an item
    kept = {}

    def kill():
        kept.update({name: step.read(f"items/{name}") for name in step.names("items")})
        ((worker, _),) = pools[0].running.values()
        status = worker.handle.pid.options(concurrency_group="status")
        os.kill(ray.get(status.remote(), timeout=240), signal.SIGKILL)

    heard = Heard(num_runs(profile_tasks(space, long)[0], long) + 1, kill)
    profile = profile_blocks(folder, space, long, CLUSTER, step, heard)
    assert len(kept) == 1 and profile.batch_sizes == (1, 2)
    assert all(step.read(f"items/{name}") == data for name, data in kept.items())
    assert heard.done == heard.total


def test_a_finished_table_starts_no_actor(local_ray, setting, tmp_path, pools):
    folder, space = setting
    step = Store(str(tmp_path)).artifact("profile", {}, {})
    first = profile_blocks(folder, space, CONFIG, CLUSTER, step, Quiet())
    assert profile_blocks(folder, space, CONFIG, CLUSTER, step, Quiet()) == first and len(pools) == 1


def test_a_device_that_may_be_added_on_demand_is_waited_for(local_ray, setting, tmp_path):
    folder, space = setting
    step = Store(str(tmp_path)).artifact("profile", {}, {})
    wanted = CONFIG.model_copy(update={"label_selector": {"ray.io/accelerator-type": "H100"}})
    with pytest.raises(ClusterError, match="1 profilers did not start within 2 s; the cluster has .*CPU: 4"):
        autoscaling = {"autoscaling": True, "placement_timeout_s": 2.0}
        profile_blocks(folder, space, wanted, CLUSTER.model_copy(update=autoscaling), step, Quiet())
    assert not step.finished


def test_an_error_of_the_measurement_comes_back_as_itself(local_ray, setting, tmp_path):
    folder, space = setting
    long = CONFIG.model_copy(update={"scenario": Scenario(2, 100, 100)})
    with pytest.raises(ProfileError, match="200 tokens in and out do not fit the parent's 128 positions"):
        profile_blocks(folder, space, long, CLUSTER, Store(str(tmp_path)).artifact("profile", {}, {}), Quiet())
