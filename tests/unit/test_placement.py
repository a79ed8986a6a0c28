"""What can be said of a cluster's nodes without one."""

import io
import urllib.request
from http.client import InvalidURL
from types import SimpleNamespace

import pytest
import ray
import torch

from actors import memory
from actors.memory import GIB, check_who_evaluates, weight_bytes, whole_model, with_memory
from actors.model_shards import placed
from actors.placement import CLAIMS, cluster_cpus, places, require, room_beside_profile
from actors.reservation import plan_shards
from actors.spill_watch import SpillWatch
from jobs.checks import check_cluster
from jobs.run import NotDone, stages
from puzzle_ray.artifacts import LayerSpace, SearchSpace
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.config import load
from puzzle_ray.errors import ClusterError
from puzzle_ray.models.blocks import CPU
from puzzle_ray.models.child import load_model
from puzzle_ray.models.head import final_states
from puzzle_ray.models.shards import ShardedModel
from puzzle_ray.profiling.settings import ProfileConfig

NODE = {
    "NodeID": "a",
    "Alive": True,
    "NodeManagerAddress": "192.0.2.1",
    "MetricsExportPort": 1,
    "Resources": {"CPU": 2.0},
    "Labels": {"kind": "spot"},
}


@pytest.fixture(autouse=True)
def one_node(monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [NODE])


@pytest.mark.parametrize("wanted", ["in (spot)", "in(spot", "!!spot", "!", "-spot", "in()", "!in(a,  b)"])
def test_a_label_selector_that_ray_refuses_is_named(wanted):
    with pytest.raises(ClusterError, match=r"profile: label_selector: kind: .* selects nothing; write a, !a, in\(a, b\)"):
        require({"num_cpus": 1, "label_selector": {"kind": wanted}}, "a profiler", "profile", autoscaling=True)


@pytest.mark.parametrize(("wanted", "room"), [("spot", 2), ("in(on-demand, spot)", 2), ("!in(a,b)", 2), ("!spot", 0), ("", 0)])
def test_a_label_selector_selects_what_ray_selects(wanted, room):
    assert require({"num_cpus": 1, "label_selector": {"kind": wanted}}, "a profiler", "profile", autoscaling=True) == room


def metrics(spilled):
    return f'ray_object_store_memory{{Component="raylet",Location="SPILLED",NodeAddress="192.0.2.1"}} {spilled}\n'.encode()


def looked(monkeypatch, answers):
    """A watch that has looked once per answer, at a node that gave those: metrics, or an error."""
    left = list(answers)

    def answer(*_, **__):
        found = left.pop(0)
        if isinstance(found, Exception):
            raise found
        return io.BytesIO(found)

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", answer)
    watch = SpillWatch(lambda: ["a"])
    for _ in answers:
        watch.look()
    assert not left
    return watch


@pytest.mark.parametrize("spilled", [(0, 5), (7, 0, 5)])
def test_what_moves_to_disk_is_said_also_when_some_was_there_before(monkeypatch, capsys, spilled):
    looked(monkeypatch, [metrics(count * 2**20) for count in spilled])
    assert "node 192.0.2.1 is full: 5.0 MiB went to its disk" in capsys.readouterr().err


def test_of_a_store_that_spills_on_and_on_a_warning_is_due_at_each_power_of_ten(monkeypatch, capsys):
    looked(monkeypatch, [metrics(count * 2**20) for count in (0, 5, 5, 40, 49, 50, 300, 700)])
    words = capsys.readouterr().err.splitlines()
    assert len(words) == 3 and ["5.0 MiB" in words[0], "50.0 MiB" in words[1], "700.0 MiB" in words[2]] == [True] * 3


@pytest.mark.parametrize("failure", [TimeoutError("late"), InvalidURL("port"), OverflowError("port"), b"", b"\xff"], ids=repr)
def test_a_node_without_metrics_is_given_up_after_a_while_and_that_is_said(monkeypatch, capsys, failure):
    looked(monkeypatch, [failure, failure, metrics(0), failure, failure])
    assert not capsys.readouterr().err, "a moment's silence is none"
    watch = looked(monkeypatch, [failure] * 3)
    watch.look()
    assert capsys.readouterr().err.count("gives no metrics") == 1


def test_what_no_node_has_yet_is_no_error_where_nodes_are_added_on_demand(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(ray, "nodes", lambda: [])
    config = load("tiny", None, ("gkd.num_workers=2",))
    with pytest.raises(ClusterError, match="gkd.num_workers: 2 CPUs are needed and the cluster has 1"):
        check_cluster(config)
    check_cluster(config.model_copy(update={"cluster": config.cluster.model_copy(update={"autoscaling": True})}))


@pytest.mark.parametrize(("gpus", "enough"), [(0, False), (1, False), (2, True)])
def test_gpus_that_only_the_last_stage_asks_for_are_missed_before_the_others(monkeypatch, gpus, enough):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0} | ({"GPU": float(gpus)} if gpus else {}))
    monkeypatch.setattr(ray, "nodes", lambda: [])
    stage = stages()["gkd"]

    def run(*words, finished=False, decided=()):
        config = load("tiny", None, ("gkd.num_workers=2", "gkd.use_gpu=true", *words))
        check_cluster(config)  # a run that ends before that stage needs none
        artifact, original = SimpleNamespace(finished=finished), SimpleNamespace(decided=decided)
        return SimpleNamespace(config=config, artifact=lambda name: artifact, original=original)

    def missing(name):
        raise NotDone("child")

    unknown = run()
    unknown.artifact = missing
    for begun in (run(), unknown):
        if enough:
            stage.foreseen(begun)
            continue
        with pytest.raises(ClusterError, match=f"gkd.num_workers: 2 GPUs are needed, one a worker, and the cluster has {gpus}"):
            stage.foreseen(begun)
    stage.foreseen(run("gkd.tokens=0"))
    stage.foreseen(run(finished=True))
    stage.foreseen(run(decided=("hardware: WARNING: gkd: 2 x worker take 2 GPUs, the cluster has 0",)))


def node(name, cpus, gpus=0, memory_gib=8, **labels):
    resources = {"CPU": float(cpus), "memory": memory_gib * float(GIB)} | ({"GPU": float(gpus)} if gpus else {})
    return NODE | {"NodeID": name, "Resources": resources, "Labels": labels}


@pytest.mark.parametrize(
    ("nodes", "profile", "cluster", "room"),
    [
        ([node("a", 8)], {}, {}, False),
        ([node("a", 8), node("b", 8)], {}, {}, True),
        ([node("a", 8), node("b", 1)], {}, {}, False),  # the profiler takes the bigger one, and two shards want two trainers
        ([node("a", 8), node("b", 1)], {}, {"num_shards": 1}, True),
        ([node("a", 8), node("b", 8)], {"num_profilers": 2}, {}, False),
        ([node("a", 8), node("b", 8)], {}, {"autoscaling": True}, False),
        ([node("a", 8), node("b", 8)], {}, {"blocks_per_trainer": 2}, False),
        ([node("a", 8, kind="spot"), node("b", 4)], {"label_selector": {"kind": "spot"}}, {}, True),
        ([node("a", 8)], {"label_selector": {"kind": "spot"}}, {}, False),
        ([node("a", 8, gpus=4)], {"num_gpus": 1}, {"gpus_per_trainer": 0.5, "gpus_per_shard": 0.5}, True),
        ([node("a", 8, gpus=2)], {"num_gpus": 1}, {"gpus_per_trainer": 0.5, "gpus_per_shard": 0.5}, False),
        ([node("a", 8, gpus=4)], {"num_gpus": 1}, {}, False),  # trainers on the CPUs that drive the GPU that is measured
        ([node("a", 8, gpus=4), node("b", 8)], {"num_gpus": 1}, {}, True),
    ],
)
def test_whether_the_library_has_room_beside_the_profile_is_known_before(monkeypatch, nodes, profile, cluster, room):
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert room_beside_profile(ProfileConfig(**profile), ClusterConfig(**cluster)) is room


def test_what_a_stage_claims_is_not_planned_with_but_is_there(monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [node("a", 4), node("b", 2)])
    CLAIMS.add("me", "a", {"CPU": 3.0})
    try:
        assert cluster_cpus() == 3 and places({"num_cpus": 2}) == 1
        assert require({"num_cpus": 4}, "a profiler", "profile", autoscaling=False) == 0, "no error: there is such a node"
    finally:
        CLAIMS.remove("me")
    assert cluster_cpus() == 6 and places({"num_cpus": 2}) == 3


def test_memory_is_asked_for_by_what_a_worker_holds_and_never_more_than_there_is(monkeypatch, capsys):
    monkeypatch.setattr(ray, "nodes", lambda: [node("a", 64)])
    monkeypatch.setattr(ray, "available_resources", lambda: {"memory": 8.0 * GIB})
    options = with_memory({"num_cpus": 1}, GIB, "a meter", "measure")
    assert options["memory"] == 1.5 * GIB and places(options) == 5, "not one per core"
    assert with_memory({"num_cpus": 1}, 7 * GIB, "a meter", "measure")["memory"] == int(0.8 * 8 * GIB)
    assert not capsys.readouterr().err
    assert with_memory({"num_cpus": 1}, 9 * GIB, "a meter", "measure") == {"num_cpus": 1}
    assert "a meter may need 9.50 GiB each, and the largest node has 8.00 GiB; Ray is not asked" in capsys.readouterr().err
    assert with_memory({"num_cpus": 1}, 3 * GIB, "a shard", "score", count=4) == {"num_cpus": 1}
    monkeypatch.setattr(ray, "available_resources", lambda: {"memory": 1.0 * GIB})
    assert with_memory({"num_cpus": 1}, GIB, "a meter", "measure") == {"num_cpus": 1}, "others hold it"


def test_more_trainers_than_layers_split_the_variants_of_layers(monkeypatch):
    """Where there are places for them, and as far as there are variants."""
    space = SearchSpace(
        (LayerSpace(("parent", "gqa:1", "noop"), ("parent", "ffn:8", "noop")), LayerSpace(("parent", "noop"), ("parent",)))
    )

    def split(cpus, num_shards=1, layers=(0, 1), **how):
        monkeypatch.setattr(ray, "nodes", lambda: [node("a", cpus)])
        plans = plan_shards(layers, ClusterConfig(num_shards=num_shards, trainers_per_layer=3, **how), space)
        return [list(zip(plan.groups, plan.parts, strict=True)) for plan in plans]

    assert split(1) == [[((0, 1), (0, 1))]]
    assert split(2) == [[((0,), (0, 1)), ((1,), (0, 1))]]
    assert split(3) == [[((0,), (0, 2)), ((0,), (1, 2)), ((1,), (0, 1))]], "the layer with the most variants first"
    assert split(9) == [[((0,), (0, 3)), ((0,), (1, 3)), ((0,), (2, 3)), ((1,), (0, 1))]], "a layer has one variant"
    assert split(9, num_shards=2) == [[((0,), (n, 3)) for n in range(3)], [((1,), (0, 1))]]
    assert split(9, layers=[1]) == [[((1,), (0, 1))]]
    with pytest.raises(ClusterError, match="4 trainers of 1 CPUs, and the cluster holds 3"):
        split(3, blocks_per_trainer=1)


@pytest.mark.parametrize(
    ("how", "words"), [({"colocate": True}, "its shard trains all of it"), ({"blocks_per_trainer": 2}, "joins them")]
)
def test_layers_that_are_split_and_joined_at_once_are_refused(how, words):
    with pytest.raises(ValueError, match=f"trainers_per_layer=2 splits .*{words}"):
        ClusterConfig(trainers_per_layer=2, **how)


def test_a_model_that_no_nodes_gpus_hold_is_refused_with_what_to_set(monkeypatch, parent_folder):
    wanted = ([str(parent_folder)], ClusterConfig(num_shards=4, gpus_per_shard=1), "a reader", "quality")
    monkeypatch.setattr(memory, "gpus_of_a_node", lambda timeout_s: (10_000, 4))
    with pytest.raises(
        ClusterError, match="quality: a whole model takes [0-9]+ GPUs, and no node has more than 4; set evaluate.num"
    ):
        whole_model(*wanted)
    monkeypatch.setattr(memory, "gpus_of_a_node", lambda timeout_s: (1 << 30, 4))
    assert whole_model(*wanted)[1] == 1
    monkeypatch.setattr(memory, "gpus_of_a_node", lambda timeout_s: (0, 0))
    with pytest.raises(
        ClusterError, match="quality: a whole model may take several GPUs, and nobody knows what .*; set evaluate.num"
    ):
        whole_model(*wanted)


def test_a_model_larger_than_the_one_gpu_that_holds_all_shards_is_spread_or_refused(monkeypatch, parent_folder):
    wanted = ([str(parent_folder)], ClusterConfig(num_shards=1, gpus_per_shard=0.5), "a reader", "quality")
    size = weight_bytes(parent_folder, 4)
    for each, most, gpus in ((size, 1, 0.5), (size - 1, 2, 2), (0, 0, 0.5)):
        monkeypatch.setattr(memory, "gpus_of_a_node", lambda timeout_s, found=(each, most): found)
        assert whole_model(*wanted)[1] == gpus
    monkeypatch.setattr(memory, "gpus_of_a_node", lambda timeout_s: (size - 1, 1))
    with pytest.raises(ClusterError, match="takes 2 GPUs, and no node has more than 1; set evaluate.num_shards"):
        whole_model(*wanted)


def test_no_cpu_evaluates_a_parent_whole_that_is_larger_than_a_gpu(monkeypatch, parent_folder):
    size = int(memory.ROOM * weight_bytes(parent_folder, 4))
    on_gpus = ClusterConfig(num_shards=2, gpus_per_shard=1)

    def checked(gpus, cluster=on_gpus, num_gpus=0.0):
        monkeypatch.setattr(memory, "gpus_of_a_node", lambda timeout_s: gpus)
        check_who_evaluates(str(parent_folder), cluster, num_gpus, "evaluation")

    checked((size, 1))
    checked((size - 1, 1), num_gpus=1)
    checked((size - 1, 1), cluster=ClusterConfig())
    checked((0, 0), cluster=ClusterConfig(num_shards=1, gpus_per_shard=1))
    with pytest.raises(
        ClusterError, match="evaluation: with profile.num_gpus=0 a CPU .* and a GPU has 0.0; set evaluate.num_shards"
    ):
        checked((size - 1, 1))
    with pytest.raises(ClusterError, match="whole parent, and nobody knows what GPUs .*; or set profile.num_gpus"):
        checked((0, 0))


def test_stages_foresee_who_evaluates(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "check_who_evaluates", lambda *how: asked.append(how[2:]))
    for name, words, expected in (
        ("evaluation", ("evaluate.num_shards=0",), [(0, "evaluation")]),
        ("evaluation", ("evaluate.num_shards=2",), []),
        ("evaluation", ("cluster.autoscaling=true",), []),
        ("sweep", ("search.sweep_gkd=true",), [(0, "evaluation")]),
        ("sweep", ("search.sweep_gkd=false",), []),
    ):
        config, parent = load("tiny", None, words), SimpleNamespace(address="parent")
        known = {"config": config, "profile_config": config.profile, "original": SimpleNamespace(parent=parent)}
        for finished in (True, False):
            asked.clear()
            stages()[name].foreseen(SimpleNamespace(artifact=lambda _, is_so=finished: SimpleNamespace(finished=is_so), **known))
            assert asked == ([] if finished else expected), (name, words)


@pytest.mark.parametrize(("gpus", "shards"), [(8.0, 3), (1.0, 1)])
def test_shards_are_as_many_as_find_a_gpu_beside_who_asks_them(monkeypatch, parent_folder, gpus, shards):
    node = {**NODE, "Resources": {"CPU": 2.0, "GPU": gpus}}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    found = placed([str(parent_folder)], ClusterConfig(gpus_per_shard=0.5), 9, "evaluate")
    assert [len(layers) for layers in found.layers] == [3 // shards] * shards  # of three layers
    assert found.shard["num_gpus"] == found.asking["num_gpus"] == 0.5 and found.shard["num_cpus"] == pytest.approx(
        1 / 2 if shards == 3 else 1
    )
    monkeypatch.setattr(ray, "nodes", lambda: [{**NODE, "Resources": {"CPU": 2.0, "GPU": 0.5}}])
    alone = placed([str(parent_folder)], ClusterConfig(gpus_per_shard=0.5), 9, "evaluate")
    started = alone.start(lambda options: options)
    assert started.worker == {"num_cpus": 1, "num_gpus": 0.5} and started.actors == [started.worker]
    assert started.shards.num_shards == 3, "whoever asks reads them one after the other"
    monkeypatch.setattr("puzzle_ray.process.device_for", lambda num_gpus: CPU)
    model = ShardedModel(str(parent_folder), started.shards.layers_of)
    ids = torch.arange(2, 8)[None]
    with torch.inference_mode():
        (found,) = model.final_states([ids], [None])
        assert torch.equal(found, final_states(load_model(parent_folder), ids))
