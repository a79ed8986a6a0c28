"""What can be said of a cluster's nodes without one."""

import io
import urllib.request
from http.client import InvalidURL

import pytest
import ray

from actors.data_plane import SpillWatch
from actors.placement import require
from jobs.checks import check_cluster
from puzzle_ray.config import load
from puzzle_ray.errors import ClusterError

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
    watch = SpillWatch(every_s=0)
    for _ in answers:
        watch.look(["a"])
    assert not left
    return watch


@pytest.mark.parametrize("spilled", [(0, 5), (7, 0, 5)])
def test_what_moves_to_disk_ends_the_run_also_when_some_was_there_before(monkeypatch, spilled):
    mib = 2**20
    with pytest.raises(ClusterError, match=r"node 192.0.2.1 is full: 5.0 MiB went to its disk"):
        looked(monkeypatch, [metrics(count * mib) for count in spilled])


@pytest.mark.parametrize("failure", [TimeoutError("late"), InvalidURL("port"), OverflowError("port"), b"", b"\xff"], ids=repr)
def test_a_node_without_metrics_is_given_up_after_a_while_and_that_is_said(monkeypatch, capsys, failure):
    looked(monkeypatch, [failure, failure, metrics(0), failure, failure])
    assert not capsys.readouterr().err, "a moment's silence is none"
    watch = looked(monkeypatch, [failure] * 3)
    watch.look(["a"])
    assert capsys.readouterr().err.count("gives no metrics") == 1


def test_what_no_node_has_yet_is_no_error_where_nodes_are_added_on_demand(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    config = load("tiny", None, ("gkd.num_workers=2",))
    with pytest.raises(ClusterError, match="gkd.num_workers: 2 CPUs are needed and the cluster has 1"):
        check_cluster(config)
    check_cluster(config.model_copy(update={"cluster": config.cluster.model_copy(update={"autoscaling": True})}))
