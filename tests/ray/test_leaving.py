"""A node that is being drained: shards and trainers move before it goes, and the library is the same."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import ray
import torch
from small_models import save_parent
from waiting import until

from actors import leaving, library_stream
from actors.leaving import is_leaving
from actors.placement import LEAVING
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.data.order import Tokens
from puzzle_ray.distill.library import build_serially
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.models.child import read_config
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

CLUSTER = ClusterConfig(placement_timeout_s=240, step_timeout_s=120)
LIBRARY = LibraryConfig(tokens=640, calibration_tokens=64, validation_tokens=64, micro_batch_tokens=32, checkpoint_every=1000)


def drain(node_id):
    """As whoever hears of a preemption does."""
    words = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test", "--deadline-remaining-seconds", "600"]
    address = ray.get_runtime_context().gcs_address
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", address, "--node-id", node_id, *words]
    subprocess.run(command, check=True, capture_output=True, timeout=240)


class At(Quiet):
    """Calls `act` once, when so many units are done; counts them."""

    def __init__(self, due, act):
        self.due, self.act, self.done = due, act, 0

    def stage(self, name, total, unit):
        self.total = total
        return nullcontext(self)

    def advance(self, count=1, **facts):
        self.done += count
        if self.act and self.done >= self.due:
            act, self.act = self.act, None
            act()


def test_shards_and_trainers_move_before_a_drained_node_goes(several_nodes, tmp_path, monkeypatch, capsys):
    for _ in range(2):
        several_nodes.add(num_cpus=1)
    monkeypatch.setattr(leaving, "EVERY_S", 0.2)
    streams, starts, drained, then = [], [], [], []
    start = library_stream.open_stream
    monkeypatch.setattr(library_stream, "open_stream", lambda *a: streams.append(start(*a)) or streams[-1])
    run = library_stream._run

    def noted(stream, *more):
        starts.append(stream.last() + 1)
        if len(streams) == 2:
            actors = [*stream.shards, *stream.trainers]
            then.append(ray.get([actor.node.remote() for actor in actors], timeout=240))
        return run(stream, *more)

    monkeypatch.setattr(library_stream, "_run", noted)

    def leave():
        drained.append(ray.get(streams[0].trainers[0].node.remote(), timeout=240))
        assert not is_leaving(drained[0])
        drain(drained[0])
        until(lambda: drained[0] in LEAVING, "it is seen")
        until(lambda: not any(t.is_alive() for t in _watchers()), "whether there is room elsewhere is known")

    folder = save_parent(tmp_path / "parent")
    space = search_space(read_config(folder), ("gqa:1", "noop"), ("ffn:24",), 8)
    tokens = Tokens(np.random.default_rng(0).integers(0, 96, (64, 16), dtype=np.int32))
    store, progress = Store(str(tmp_path / "store")), At(12, leave)
    library = library_stream.build_library(
        str(folder), space, LIBRARY, CLUSTER, tokens, 0, store.artifact("library", {}, {}), progress
    )
    assert len(streams) == 2 and drained[0] not in then[0], "its time is not over, but nothing of the run is there"
    assert starts[0] == 0 and starts[1] >= 12, "what was done is saved, though no checkpoint was due"
    assert progress.done == progress.total
    assert f"node {drained[0][:8]} is being drained: shards and trainers move" in capsys.readouterr().err
    torch.set_num_threads(1)
    serial = build_serially(str(folder), space, LIBRARY, tokens, 0, store.artifact("library", {"by": "one"}, {}), Quiet())
    assert serial.rows() == library.rows() and serial.curves() == library.curves()
    for name in library.artifact.names():
        if name.endswith(".safetensors"):
            x, y = serial.artifact.read_tensors(name)[0], library.artifact.read_tensors(name)[0]
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), name


def _watchers():
    import threading

    return [thread for thread in threading.enumerate() if thread.name == "leaving nodes"]
