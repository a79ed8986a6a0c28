"""Nodes that are added on demand, by Ray's own autoscaler: what is asked for is what one worker needs, so a node of some type can hold it.

The head and the nodes that the autoscaler starts are processes of this machine, with resources that Ray is only told of.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from waiting import until

ROOT = Path(__file__).parents[2]
TYPES = {
    "cpu": {"resources": {"CPU": 2, "cpu_type": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3},
    "gpu": {"resources": {"CPU": 8, "GPU": 1, "gpu_type": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3},
}
CONFIG = {  # as `ray.cluster_utils.AutoscalingCluster` has it, which itself ends every Ray of a machine
    "cluster_name": "on-demand",
    "provider": {"type": "fake_multinode", "disable_node_updaters": True},
    "available_node_types": TYPES | {"ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}},
    "head_node_type": "ray.head.default",
    "max_workers": 6,
    "upscaling_speed": 10.0,
    "idle_timeout_minutes": 30,
    **dict.fromkeys(("auth", "docker", "file_mounts"), {}),
    **dict.fromkeys(("cluster_synced_files", "rsync_exclude", "rsync_filter"), []),
    **dict.fromkeys(("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"), []),
    **dict.fromkeys(("head_start_ray_commands", "worker_start_ray_commands"), []),
    "file_mounts_sync_continuously": False,
}
ASKS = """
import collections, json, sys
import ray
from actors.reservation import Reservation, plan_shards
from puzzle_ray.cluster import ClusterConfig

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
cluster = ClusterConfig(autoscaling=True, placement_timeout_s=150, num_shards=2, blocks_per_trainer=1, **json.loads(sys.argv[2]))
plans = plan_shards(range(4), cluster)
reservation = Reservation.make(plans, cluster)
types = collections.Counter()
for node in ray.nodes():
    if node["Alive"]:
        types.update(name for name in ("cpu_type", "gpu_type") if name in node["Resources"])
hosts = reservation.shards_of_nodes()
print(json.dumps({"types": types, "hosts": len(hosts), "shards": sorted({s for held in hosts.values() for s in held})}))
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """The address of a head without CPUs whose autoscaler may start nodes of two types."""
    folder = tmp_path_factory.mktemp("autoscaling")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    provider = CONFIG["provider"] | {"gcs_address": f"127.0.0.1:{port}"}
    (folder / "types.json").write_text(json.dumps(CONFIG | {"provider": provider}))
    environment = os.environ | {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_AUTH_MODE": "disabled"}
    environment["RAY_TMPDIR"] = "/tmp/ray-autoscaling"  # sockets have short paths; no other cluster's `auto` finds this one
    Path(environment["RAY_TMPDIR"]).mkdir(exist_ok=True)
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--num-cpus=0"]
    ray += [f"--autoscaling-config={folder / 'types.json'}", "--include-dashboard=false", "--node-ip-address=127.0.0.1"]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(ray, env=environment, stdout=log, stderr=log, start_new_session=True)
    until(lambda: "Ray runtime started" in (folder / "log.txt").read_text(), "the head is there", 120)
    yield f"127.0.0.1:{port}", environment
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait(30)


def ask(head, **settings):
    address, environment = head
    words = [sys.executable, "-c", ASKS, address, json.dumps(settings)]
    done = subprocess.run(words, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1]), done.stderr


def test_what_needs_no_gpu_gets_nodes_without_any(head):
    """Two shards of two blocks, a core for each."""
    found, said = ask(head)
    assert found == {"types": {"cpu_type": 2}, "hosts": 2, "shards": [0, 1]}
    assert "asks for nodes for 4 workers, the largest of CPU: 1" in said


def test_workers_are_asked_for_one_by_one_and_the_nodes_that_hold_them_come(head):
    """With its trainers on one node a shard would need 1.5 GPUs, and no node has more than one."""
    found, said = ask(head, gpus_per_trainer=0.5, gpus_per_shard=0.5)
    assert found["types"]["gpu_type"] == 3 and found["hosts"] == 3 and found["shards"] == [0, 1]
    assert "asks for nodes for 4 workers, the largest of CPU: 1, GPU: 1" in said
