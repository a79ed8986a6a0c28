"""The node that will measure says what a profile is of."""

import pytest
import ray
from small_runs import make_run, save_parent_with_text

from actors import profiler
from actors.profiler import ask_target, profile_blocks
from puzzle_ray.artifacts import Profile
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.errors import ClusterError, ProfileError
from puzzle_ray.profiling.engine import Target, target_here
from puzzle_ray.profiling.measure import PROFILE_TABLE
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.progress import Quiet

CLUSTER = ClusterConfig(placement_timeout_s=240, step_timeout_s=240)
SMALL = ("profile.repeats=2", "profile.stack=1", "profile.scenario={batch_size: 1, input_tokens: 6, output_tokens: 3}")


@pytest.fixture(scope="module")
def parent_with_text(tmp_path_factory):
    return save_parent_with_text(tmp_path_factory.mktemp("parent"))


def test_the_key_is_of_the_node_that_is_selected(several_nodes, parent_with_text, tmp_path):
    """Nodes of one CPU, but of another number of them: a profile computes with all that its node has."""
    several_nodes.add(num_cpus=3)
    several_nodes.add(num_cpus=1, resources={"old": 1}, labels={"kind": "old"})

    def target(*settings):
        run = make_run(parent_with_text, tmp_path, *SMALL, *settings)
        assert run.artifact("profile").inputs["target"] == run.target.device
        return run.target.device, run.artifact("profile").key

    biggest, by_resource, by_label = target(), target("profile.resources={old: 1}"), target("profile.label_selector={kind: old}")
    assert biggest[0].endswith(", 3 threads") and by_resource[0].endswith(", 1 threads") and by_label[0] == by_resource[0]
    assert biggest[1] != by_resource[1] == by_label[1], "how a device is asked for is no part of the key"
    run = make_run(parent_with_text, tmp_path, *SMALL, "profile.resources={old: 1}")
    run.done("profile")
    assert run.artifact("profile").facts()["device"] == by_resource[0], "it has measured what the key says"
    with pytest.raises(ClusterError, match="no node can hold a profiler with CPU: 1, new: 1"):
        target("profile.resources={new: 1}")


def test_a_node_that_is_busy_is_waited_for_with_a_limit(several_nodes):
    several_nodes.add(num_cpus=2)

    @ray.remote(num_cpus=2)
    class Busy:
        def ready(self):
            return True

    busy = Busy.remote()
    assert ray.get(busy.ready.remote(), timeout=240)
    with pytest.raises(ClusterError, match="the question what a profiler would measure did not start within 2 s"):
        ask_target(ProfileConfig(), CLUSTER.model_copy(update={"placement_timeout_s": 2.0}))
    ray.kill(busy)
    assert ask_target(ProfileConfig(), CLUSTER) == target_here(ProfileConfig(), 2)


def test_a_device_that_torch_does_not_see_is_the_errors_own_line(several_nodes, monkeypatch):
    several_nodes.add(num_cpus=1)
    monkeypatch.setattr(profiler, "profiler_options", lambda config: {"num_cpus": 1})  # a node that promises a GPU
    with pytest.raises(ProfileError, match="a GPU is asked for, but PyTorch sees none here"):
        ask_target(ProfileConfig(num_gpus=1), CLUSTER)


def test_a_profiler_that_measures_something_else_ends_the_stage(several_nodes, parent_with_text, tmp_path):
    several_nodes.add(num_cpus=1)
    run = make_run(parent_with_text, tmp_path, *SMALL)
    artifact = run.artifact("profile")
    other = Target("another CPU, 4 threads", run.target.engine_version)
    arguments = (run.parent.address, run.whole_space, run.profile_config, CLUSTER, artifact, Quiet(), None)
    with pytest.raises(ProfileError, match="the profile is of torch .* on another CPU, 4 threads, and items/.* was measured by"):
        profile_blocks(*arguments, other)
    assert not artifact.names("items") and not artifact.finished
    run.done("profile")
    assert Profile.from_parquet(artifact.read(PROFILE_TABLE)).device == run.target.device
