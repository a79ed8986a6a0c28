"""What can be seen of a run on Ray: its actors by name, the cluster, and our gauges where Prometheus reads them."""

from __future__ import annotations

import urllib.request

import pytest
from waiting import until

from actors import metrics
from actors.cluster_view import cluster_view
from actors.lone_worker import LoneWorker
from actors.names import actor_name


def test_actors_have_names_that_say_what_they_are_for(local_ray):
    worker = LoneWorker.options(num_cpus=1, **actor_name("worker, evaluate")).remote("evaluate")
    try:
        assert local_ray.get(worker.node.remote(), timeout=240)
        view = cluster_view()
        assert view["workers"] == {"worker": 1} and view["nodes"] == 1 and view["resources"]["CPU"][0] == 4
    finally:
        local_ray.kill(worker)
    until(lambda: not cluster_view()["workers"], "it is gone from the view")


def test_gauges_are_where_prometheus_reads_them(local_ray):
    metrics.of_run("a-run")
    (node,) = local_ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def exported():
        metrics.note("tokens_per_s", 1234.5, stage="library")
        with urllib.request.urlopen(url, timeout=240) as answer:
            lines = answer.read().decode().splitlines()
        return [line for line in lines if line.startswith("ray_puzzle_ray_tokens_per_s{") and line.endswith(" 1234.5")]

    until(exported, "the gauge is exported", 90)
    (line,) = exported()
    assert 'run="a-run"' in line.lower() and 'stage="library"' in line.lower()


def test_a_gauge_that_is_not_there_is_a_fault_of_ours(local_ray):
    with pytest.raises(KeyError):
        metrics.note("tokns_per_s", 1.0, stage="library")
