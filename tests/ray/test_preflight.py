"""Every node is asked before work, on several nodes; what is wrong names the node, and nothing that was written stays."""

import dataclasses
import time

import pytest
import ray
from small_models import save_parent

from actors import preflight
from actors.preflight import check_nodes
from jobs.checks import check_cluster
from puzzle_ray.config import load
from puzzle_ray.errors import ClusterError
from puzzle_ray.preflight import look
from puzzle_ray.store import Store


def on(victim, monkeypatch, lies):
    """That node looks in its own way."""

    def looks(question, name, look=look):
        return lies(question, name, look) if name == victim else look(question, name)

    monkeypatch.setattr(preflight, "look", looks)


def test_nodes_that_can_work_together_pass_and_each_that_cannot_is_named(several_nodes, tmp_path, monkeypatch, capsys):
    nodes = [several_nodes.add(num_cpus=1) for _ in range(2)]
    store, folder = Store(str(tmp_path / "store")), str(save_parent(tmp_path / "parent"))
    artifact = store.artifact("library", {}, {})
    words = (f"store={store.root}", f"parent={folder}", "data.train=unread")

    capsys.readouterr()
    with artifact.lease() as lease:
        check_cluster(load(None, None, words))
        lease.check()
    assert capsys.readouterr().err == "" and not list((tmp_path / "store").rglob("*"))

    private, bad = str(tmp_path / "private"), nodes[1]
    moved = {"store": private, "folder": f"{private}/x"}
    on(bad, monkeypatch, lambda question, name, look: look(dataclasses.replace(question, **moved), name))
    with pytest.raises(ClusterError, match=rf"does not hold what the driver wrote on node \S+ \({bad[:8]}\); name a folder"):
        check_cluster(load(None, None, words))
    on(bad, monkeypatch, lambda question, name, look: look(dataclasses.replace(question, parent="/no/parent"), name))
    with pytest.raises(ClusterError, match=rf"parent: .* is not on node .*{bad[:8]}"):
        check_nodes(store, folder, False, 60)
    on(bad, monkeypatch, lambda question, name, look: exec("import no_such_module"))
    with pytest.raises(ClusterError, match=rf"cannot run on node .*{bad[:8]}\) \(ModuleNotFoundError: .*no_such_module"):
        check_nodes(store, folder, False, 60)
    on(bad, monkeypatch, lambda question, name, look: time.sleep(60))
    with pytest.raises(ClusterError, match=rf"did not answer within 2 s: nodes? .*{bad[:8]}\)"):
        check_nodes(store, folder, False, 2)
    assert not list((tmp_path / "store").rglob("*")) and not (tmp_path / "private").exists()


def test_gpus_that_torch_does_not_see_are_an_error_where_some_are_asked_for(several_nodes, tmp_path):
    several_nodes.add(num_cpus=1, num_gpus=99)
    store = Store(str(tmp_path))
    check_nodes(store, None, False, 60)
    with pytest.raises(ClusterError, match=r"torch sees fewer GPUs than Ray gives out on node .* \(\d of 99 on "):
        check_nodes(store, None, True, 60)
    assert ray.is_initialized() and not list(tmp_path.iterdir())
