"""What `hardware: auto` sees of a Ray cluster: CPUs, memory, and GPUs by the name that Ray has for them where torch sees none."""

import pytest

from actors.nodes import find_nodes, gpus_in_all
from jobs.checks import check_cluster
from puzzle_ray.config import load
from puzzle_ray.errors import ClusterError
from puzzle_ray.profiling.devices import KNOWN_DEVICES
from puzzle_ray.profiling.nodes import gpus_of, probe_gpus


@pytest.mark.skipif(probe_gpus(False) is not None, reason="the GPUs of this machine would answer for those that Ray is told of")
def test_gpus_are_known_by_their_label_and_idle_ones_are_a_warning(several_nodes, tmp_path, capsys):
    several_nodes.add(num_cpus=2, num_gpus=8, labels={"ray.io/accelerator-type": "H100"})
    several_nodes.add(num_cpus=1)
    found = [node for node in find_nodes(60) if node.gpus is not None]
    assert [node.gpus for node in found] == [gpus_of(KNOWN_DEVICES["H100"], 8)] and found[0].cpus == 2
    assert sum(node.gpus is None and node.cpus == 1 for node in find_nodes(60)) >= 1 and gpus_in_all() == 8
    with pytest.raises(ClusterError, match="gkd.num_workers: 99 CPUs are needed"):
        check_cluster(load(None, None, ("gkd.num_workers=99",)))
    check_cluster(load(None, None, (f"store={tmp_path}", "parent=org/model", "data.train=unread")))
    assert "WARNING: 8 GPUs are idle while the library, scoring, GKD compute on CPUs; set cluster" in capsys.readouterr().err
    several_nodes.add(num_cpus=1, num_gpus=3)
    with pytest.raises(ClusterError, match="nobody knows the 3 GPUs of node .*; write what the cluster has, such as hardware:"):
        find_nodes(60)
