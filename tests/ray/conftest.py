"""One local Ray cluster for all tests of this folder, and one of several nodes for those that lose some."""

from __future__ import annotations

import os
from contextlib import suppress

import psutil
import pytest
from waiting import until

os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # small trainings report often

SYSTEM = {  # a node that is gone is missed within a second, what goes to disk is seen as soon
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 200,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
    "metrics_report_interval_ms": 500,
}


def pytest_collection_modifyitems(items):
    """A process has one Ray at a time: the clusters of several nodes come and go before the one that stays."""
    items.sort(key=lambda item: "several_nodes" not in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def local_ray(warm_python):
    """Loopback only, ended with the session; never joins a cluster that happens to run here."""
    import ray

    with warm_python.used():
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=4,
            object_store_memory=256 << 20,
            log_to_driver=False,
            logging_level="ERROR",
        )
    yield ray
    ray.shutdown()


class Nodes:
    """Adds nodes to a cluster and takes them away again; what a test leaves is removed after it."""

    def __init__(self, cluster, python):
        self.cluster, self.python, self.added = cluster, python, {}

    def add(self, **options):
        """Its id."""
        before = self.alive()
        with self.python.used():
            node = self.cluster.add_node(**({"object_store_memory": 80 << 20} | options))
        (node_id,) = self.alive() - before
        self.added[node_id] = node
        return node_id

    def kill(self, node_id):
        """The raylet and all its workers, at once. Left to themselves, workers go on for a moment without their raylet."""
        node = self.added.pop(node_id)
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in (raylet, *raylet.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.cluster.remove_node(node, allow_graceful=False)
        until(lambda: node_id not in self.alive(), "the dead node is missed")

    @staticmethod
    def alive():
        import ray

        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@pytest.fixture(scope="module")
def _head(warm_python):
    import ray
    from ray.cluster_utils import Cluster

    assert not ray.is_initialized(), "these tests come before those with `local_ray`"
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": SYSTEM}
    with warm_python.used():
        cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def several_nodes(_head, warm_python):
    """A head without CPUs, which is the driver's node; the test adds others."""
    nodes = Nodes(_head, warm_python)
    yield nodes
    for node_id in list(nodes.added):
        nodes.kill(node_id)
