"""Several nodes: what runs where, and what the loss of a whole node changes: nothing."""

import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.torch import load_file
from small_models import save_parent
from waiting import until

from actors import block_trainer, library_stream, parent_shard, profiler
from actors.data_plane import Flow
from actors.placement import CLAIMS, cluster_cpus, places, room_beside_profile
from actors.reservation import Reservation, ShardPlan, check_stores, plan_shards
from actors.spill_watch import SpillWatch
from jobs.run import Run
from jobs.stages.tokens import read
from puzzle_ray.artifacts import Scenario
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.config import load
from puzzle_ray.data.order import Tokens
from puzzle_ray.distill.bld import Schedule
from puzzle_ray.distill.library import Library, build_serially
from puzzle_ray.distill.library_checkpoints import checkpoint_file, variant_file
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.errors import ClusterError
from puzzle_ray.models.child import read_config
from puzzle_ray.profiling.measure import profile_tasks
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

ROOT = Path(__file__).parents[2]
H100 = {"ray.io/accelerator-type": "H100"}
CLUSTER = ClusterConfig(placement_timeout_s=240, step_timeout_s=120)
PATIENT = CLUSTER.model_copy(update={"placement_timeout_s": 24 * 3600.0})  # what waits for it never ends
PROFILE = ProfileConfig(
    scenario=Scenario(1, 6, 3), batch_sizes=(2, 3, 4, 5, 6, 7, 8), repeats=2, stack=1, num_profilers=2, resources={"H100": 1}
)


class When(Quiet):
    """Calls `act` once, as soon as `due` is true of the units done."""

    def __init__(self, due, act):
        self.due, self.act, self.done = due, act, 0

    def stage(self, name, total, unit):
        self.total = total
        return nullcontext(self)

    def advance(self, count=1, **facts):
        self.done += count
        if self.act and self.due(self.done):
            act, self.act = self.act, None
            act()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A file with a line for the begin and the end of every measurement: when, where, what."""
    log = tmp_path / "measured.jsonl"

    class Watched(profiler.ShapeProfiler):
        def devices(self):
            return sum(node["Alive"] and node["Resources"].get("H100", 0) for node in ray.nodes())

        def work(self, item):
            node = ray.get_runtime_context().get_node_id()

            def note(event):
                with log.open("a") as file:
                    file.write(json.dumps([event, item.name, node]) + "\n")

            note("begin")
            deadline = time.monotonic() + 120
            while (
                len({json.loads(line)[-1] for line in log.read_text().splitlines()}) < self.devices()
                and time.monotonic() < deadline
            ):
                time.sleep(0.05)  # the others' processes take longer to start
            time.sleep(0.3)
            result = super().work(item)
            note("end")
            return result

    monkeypatch.setattr(profiler, "Profiler", ray.remote(concurrency_groups={"status": 1})(Watched))
    return log


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = save_parent(tmp_path_factory.mktemp("parent"))
    return str(folder), search_space(read_config(folder), ("noop",), ("noop",), 8)


def test_profilers_use_the_nodes_that_have_the_device_and_outlive_one_of_them(several_nodes, small, tmp_path, measured):
    several_nodes.add(num_cpus=2)
    devices = {several_nodes.add(num_cpus=1, resources={"H100": 1}, labels=H100) for _ in range(2)}
    step = Store(str(tmp_path)).artifact("profile", {}, {})
    items = profile_tasks(small[1], PROFILE)
    kept, lost = {}, []

    def at_work():
        """Item -> node, and whether two nodes worked at the same time so far."""
        now, both = {}, False
        for event, name, node in lines(measured):
            now = now | {name: node} if event == "begin" else {k: v for k, v in now.items() if k != name}
            both |= set(now.values()) == devices
        return now, both

    def due(done):
        now, both = at_work()
        return both and now and len(step.names("items")) >= 2

    def kill():
        kept.update({name: step.read(f"items/{name}") for name in step.names("items")})
        lost.extend(at_work()[0].items())
        several_nodes.kill(lost[0][1])

    progress = When(due, kill)
    profiler.profile_blocks(*small, PROFILE, CLUSTER, step, progress)
    begun = [name for event, name, _ in lines(measured) if event == "begin"]
    again = {name for name in begun if begun.count(name) > 1}
    assert lost and {node for *_, node in lines(measured)} == devices
    assert set(begun) == {item.name for item in items} and again <= {lost[0][0]} and len(begun) <= len(items) + 1
    assert all(step.read(f"items/{name}") == data for name, data in kept.items())
    assert progress.done == progress.total


def test_losing_the_last_node_with_the_device_is_an_error_at_once(several_nodes, small, tmp_path, measured):
    several_nodes.add(num_cpus=1)
    only = several_nodes.add(num_cpus=1, resources={"H100": 1})
    step = Store(str(tmp_path)).artifact("profile", {}, {})
    with pytest.raises(ClusterError, match=r"no node can hold a profiler with CPU: 1, H100: 1; the cluster has .*\{CPU: 1\}"):
        profiler.profile_blocks(*small, PROFILE, PATIENT, step, When(lambda done: True, lambda: several_nodes.kill(only)))


def test_a_device_no_node_has_is_refused_at_once_with_what_there_is(several_nodes, small, tmp_path):
    several_nodes.add(num_cpus=1, resources={"H100": 1}, labels=H100)
    step = Store(str(tmp_path)).artifact("profile", {}, {})
    for asked in ({"resources": {"A100": 1}}, {"label_selector": {"ray.io/accelerator-type": "in(A100, B200)"}}, {"num_gpus": 1}):
        wanted = PROFILE.model_copy(update={"resources": {}} | asked)
        with pytest.raises(ClusterError, match=r"the cluster has .*\{CPU: 1, H100: 1, ray.io/accelerator-type: H100\}"):
            profiler.profile_blocks(*small, wanted, PATIENT, step, Quiet())
    assert places({"num_cpus": 1, "label_selector": {"ray.io/accelerator-type": "!in(A100, B200)"}}) == 1
    assert places({"num_cpus": 1, "label_selector": {"ray.io/accelerator-type": "!H100"}}) == 0


def test_a_library_beside_a_profile_takes_what_the_profilers_leave(several_nodes, small, tmp_path, measured):
    """Asked before anything starts, and then so: no node does both."""
    devices = {several_nodes.add(num_cpus=1, resources={"H100": 1}) for _ in range(2)}
    assert not room_beside_profile(PROFILE, CLUSTER), "the profilers take all there is"
    others = {several_nodes.add(num_cpus=1) for _ in range(2)}
    assert room_beside_profile(PROFILE, CLUSTER) and not room_beside_profile(
        PROFILE, CLUSTER.model_copy(update={"num_shards": 3})
    )
    assert not room_beside_profile(PROFILE, CLUSTER.model_copy(update={"blocks_per_trainer": 1})), (
        "how many trainers is not known"
    )
    placed, short = threading.Event(), PROFILE.model_copy(update={"batch_sizes": (2, 3)})
    step = Store(str(tmp_path)).artifact("profile", {}, {})
    profiling = threading.Thread(target=profiler.profile_blocks, args=(*small, short, CLUSTER, step, Quiet(), placed))
    profiling.start()
    try:
        assert placed.wait(240) and not step.finished
        assert {node for node, _ in CLAIMS.held.values()} == devices
        assert cluster_cpus() == 2 and places({"num_cpus": 1}) == 2 and places({"resources": {"H100": 1}}) == 0
        plans = plan_shards(range(4), CLUSTER)
        assert [plan.groups for plan in plans] == [((0, 1),), ((2, 3),)], "a trainer for each place that is left"
        reservation = Reservation.make(plans, CLUSTER)
        assert set(reservation.shards_of_nodes()) == others
        reservation.release([])
    finally:
        profiling.join(120)
    assert step.finished and not CLAIMS.held and cluster_cpus() == 4


@pytest.mark.wide  # test_pool.py has it of five workers
def test_of_three_profilers_two_that_die_at_once_leave_the_third_to_its_work(several_nodes, small, tmp_path, measured):
    """There is no room for others in their place."""
    devices = [several_nodes.add(num_cpus=1, resources={"H100": 1}) for _ in range(3)]
    many = PROFILE.model_copy(update={"num_profilers": 3})
    step = Store(str(tmp_path)).artifact("profile", {}, {})

    def due(done):
        now = {name: node for event, name, node in lines(measured) if event == "begin"}
        return set(now.values()) == set(devices)

    def kill():
        for node in devices[1:]:
            several_nodes.kill(node)

    profiler.profile_blocks(*small, many, CLUSTER, step, When(due, kill))
    assert len(step.names("items")) == len(profile_tasks(small[1], many))


LIBRARY = LibraryConfig(tokens=960, calibration_tokens=64, validation_tokens=64, micro_batch_tokens=32, checkpoint_every=4)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """Four layers, a tokenizer, their search space, and random text."""
    folder = save_parent(tmp_path_factory.mktemp("parent"), num_hidden_layers=4, vocab_size=VOCAB_SIZE + 7)
    byte_tokenizer().save_pretrained(folder)
    space = search_space(read_config(folder), ("gqa:1", "noop"), ("ffn:24",), 8)
    return str(folder), space, Tokens(np.random.default_rng(0).integers(0, 96, (64, 16), dtype=np.int32))


def longer_text() -> Tokens:
    """For micro-batches of 1,024 tokens: `parent`'s text would all be taken for validation."""
    return Tokens(np.random.default_rng(0).integers(0, 96, (256, 16), dtype=np.int32))


def assert_same(a: Library, b: Library):
    assert a.rows() == b.rows() and a.curves() == b.curves()
    for name in a.artifact.names():
        if name.endswith(".safetensors"):
            x, y = a.artifact.read_tensors(name)[0], b.artifact.read_tensors(name)[0]
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), name


def test_losing_a_node_with_a_shard_and_its_trainers_changes_nothing(several_nodes, parent, tmp_path, monkeypatch, capsys):
    """And before that, each shard is on one node with all trainers of its layers."""
    for _ in range(3):
        several_nodes.add(num_cpus=2)
    cluster = CLUSTER.model_copy(update={"blocks_per_trainer": 1})
    streams, seen = [], []
    start = library_stream.open_stream
    monkeypatch.setattr(library_stream, "open_stream", lambda *a: streams.append(start(*a)) or streams[-1])

    def nodes():
        stream = streams[-1]
        shards, trainers = (
            ray.get([a.node.remote() for a in actors], timeout=240) for actors in (stream.shards, stream.trainers)
        )
        return [(shard, *trainers[2 * n : 2 * n + 2]) for n, shard in enumerate(shards)]

    def kill():
        seen.append(nodes())
        several_nodes.kill(seen[0][0][0])

    store = Store(str(tmp_path))
    progress = When(lambda done: done >= 15, kill)
    folder, space, tokens = parent
    library = library_stream.build_library(
        folder, space, LIBRARY, cluster, tokens, 0, store.artifact("library", {}, {}), progress
    )
    (before,) = seen
    assert [len(set(group)) for group in before] == [1, 1] and before[0] != before[1]
    torch.set_num_threads(1)
    serial = build_serially(folder, space, LIBRARY, tokens, 0, store.artifact("library", {"by": "one process"}, {}), Quiet())
    assert_same(serial, library)
    said = capsys.readouterr().err
    assert "MiB in a node's object store" in said and "shard 1, layers 2 to 3: " in said
    until(lambda: ray.available_resources().get("CPU") == 4, "what was reserved is free again")


@pytest.mark.wide  # losing a node that others can stand in for is above
def test_trainers_that_find_no_other_node_are_an_error(several_nodes, parent, tmp_path, monkeypatch):
    only = several_nodes.add(num_cpus=1)
    streams = []
    start = library_stream.open_stream
    monkeypatch.setattr(library_stream, "open_stream", lambda *a: streams.append(start(*a)) or streams[-1])

    def kill():
        streams[0].cluster = CLUSTER.model_copy(update={"placement_timeout_s": 2.0})
        several_nodes.kill(only)

    folder, space, tokens = parent
    step = Store(str(tmp_path)).artifact("library", {}, {})
    progress = When(lambda done: done >= 9, kill)
    with pytest.raises(ClusterError, match=r"trainers that died did not start within 2 s; the cluster has \{\}"):
        library_stream.build_library(folder, space, LIBRARY, CLUSTER, tokens, 0, step, progress)
    assert len(step.names("checkpoints")) == 2 * 4 * 3, "of every variant its start, and the rest"


def test_shards_load_their_own_layers_only_and_send_each_state_once(parent):
    """Two halves hold the checkpoint once, but for the embedding, which is the head's weight as well."""
    folder, _, tokens = parent
    shards = [parent_shard.Shard(folder, 2 * n, 2 * n + 2, "float32", "bfloat16", 1, "object_store") for n in range(2)]
    ids = tokens.batch(0, 0, 4)
    hidden = shards[0].forward(ids.numpy())
    hidden += shards[1].forward(hidden[-1])
    assert len(hidden) == 5 and all(state.shape == (4, 16, 32) for state in hidden)
    first, second = (shard.usage() for shard in shards)
    assert first.sent_bytes + second.sent_bytes == 5 * 32 * 2 * ids.numel() and first.sent_tokens == ids.numel()
    tensors = load_file(Path(folder) / "model.safetensors")
    total, shared = sum(v.nbytes for v in tensors.values()), tensors["model.embed_tokens.weight"].nbytes
    assert first.weights_bytes + second.weights_bytes == total + shared
    assert max(first.weights_bytes, second.weights_bytes) < 0.7 * total
    assert min(first.peak_rss_bytes, second.peak_rss_bytes) > first.weights_bytes


def test_slow_trainers_hold_the_shard_back_and_a_store_that_spills_is_a_warning(
    several_nodes, parent, tmp_path, monkeypatch, capsys
):
    """By Ray's own figures a window's hidden states are in the store, each once, and never more."""
    node = several_nodes.add(num_cpus=1)
    log = tmp_path / "order"

    def note(word):
        with log.open("a") as file:
            file.write(word + "\n")

    class SlowTrainer(block_trainer.Trainer):
        def step(self, position, *args):
            time.sleep(0.15)
            loss = super().step(position, *args)
            note("trained")
            return loss

    class SeenShard(parent_shard.Shard):
        def forward(self, entering):
            note("sent")
            return super().forward(entering)

    for module, name, actor, retries in (
        (library_stream, "BlockTrainer", SlowTrainer, 0),
        (library_stream, "ParentShard", SeenShard, -1),
    ):
        monkeypatch.setattr(module, name, ray.remote(max_restarts=-1, max_task_retries=retries)(actor))
    monkeypatch.setattr(library_stream, "SpillWatch", functools.partial(SpillWatch, every_s=0.2))
    total, used, stop, held = ray.cluster_resources()["object_store_memory"], [], threading.Event(), []
    said = []

    def sample():
        while not stop.wait(0.05):
            used.append(total - ray.available_resources().get("object_store_memory", total))

    @ray.remote(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
    def fill():
        return np.zeros(70 << 20, np.uint8)

    def fill_the_store():
        stop.set()
        held.append(fill.remote())
        until(lambda: said.append(capsys.readouterr().err) or "went to its disk" in "".join(said), "the spill is said")
        raise Stop

    class Stop(Exception):
        pass

    config = LIBRARY.model_copy(update={"micro_batch_tokens": 1024, "tokens": 1 << 20})
    cluster = CLUSTER.model_copy(update={"num_shards": 1})
    sampler = threading.Thread(target=sample)
    sampler.start()
    (folder, space, _), tokens = parent, longer_text()
    step = Store(str(tmp_path)).artifact("library", {}, {})
    try:
        with pytest.raises(Stop):
            library_stream.build_library(
                folder, space, config, cluster, tokens, 0, step, When(lambda done: done >= 20, fill_the_store)
            )
    finally:
        stop.set()
        sampler.join()
    assert re.search("warning: the object store of node .* is full: .* MiB went to its disk", "".join(said))
    assert not [thread for thread in threading.enumerate() if thread.name == "spill watch"], "it ends with its stage"
    flow = Flow.of(config, 32, 1)
    full = flow.window * 5 * flow.state_bytes
    assert full <= max(used) <= flow.bound_bytes(5) < 1.1 * full
    ahead = np.cumsum([1 if word == "sent" else -1 for word in log.read_text().split()])
    assert ahead.max() == flow.window


def test_a_store_that_is_too_small_is_refused_before_work(several_nodes, parent, tmp_path):
    several_nodes.add(num_cpus=1)
    (folder, space, _), tokens = parent, longer_text()
    config = LIBRARY.model_copy(update={"window": 200, "micro_batch_tokens": 1024})
    step = Store(str(tmp_path)).artifact("library", {}, {})
    words = "200 micro-batches x 5 hidden states x 0.125 MiB = .* of 80 MiB.*library.window.*bfloat16.*--object-store-memory"
    with pytest.raises(ClusterError, match=words):
        library_stream.build_library(folder, space, config, CLUSTER, tokens, 0, step, Quiet())
    assert not step.names()
    until(lambda: ray.available_resources().get("CPU") == 1, "what was reserved is free again")
    assert check_stores(Flow.of(config, 32, 1), [ShardPlan(range(4), ())], {"a node that died just now": {0}}) == 0


def test_trainers_that_fit_no_node_together_are_packed_and_what_finds_no_place_is_an_error(several_nodes, parent, capsys):
    nodes = {several_nodes.add(num_cpus=1) for _ in range(2)}
    cluster = CLUSTER.model_copy(update={"num_shards": 1})
    plans = plan_shards(range(4), cluster)
    assert plans == [ShardPlan(range(4), ((0, 1), (2, 3)))]
    reservation = Reservation.make(plans, cluster)
    assert reservation.shards_of_nodes() == {node: {0} for node in nodes}
    assert "hidden states cross the network" in capsys.readouterr().err
    with pytest.raises(ClusterError, match=r"did not start within 1 s; the cluster has 2 x \{CPU: 1\}, \{\}; 0 CPUs are free"):
        Reservation.make(plans, cluster.model_copy(update={"placement_timeout_s": 1.0}))
    reservation.release([])
    until(lambda: ray.available_resources().get("CPU") == 2, "what was reserved is free again")


def test_gpus_are_reserved_for_shards_and_trainers_and_what_torch_cannot_use_is_an_error(several_nodes, parent, tmp_path):
    """Ray believes what it is told of GPUs; the processes that get them look."""
    node = several_nodes.add(num_cpus=4, num_gpus=2)
    cluster = CLUSTER.model_copy(update={"gpus_per_shard": 0.5, "gpus_per_trainer": 0.5})
    plans = plan_shards(range(4), cluster)
    assert [plan.groups for plan in plans] == [((0, 1),), ((2, 3),)], "two shards leave room for two trainers"
    reservation = Reservation.make(plans, cluster)
    assert reservation.shards_of_nodes() == {node: {0, 1}}
    reserved = [bundle for bundle in ray.util.placement_group_table(reservation.group)["bundles"].values()]
    assert reserved == [{"CPU": 1.0, "GPU": 1.0}] * 2
    reservation.release([])
    until(lambda: ray.available_resources().get("GPU") == 2, "what was reserved is free again")
    for changes, words in (
        ({"gpus_per_trainer": 3}, "no node can hold a block trainer with CPU: 1, GPU: 3"),
        ({"gpus_per_shard": 3}, "no node can hold a parent shard with GPU: 3"),
        ({"blocks_per_trainer": 1}, "4 trainers of 1 CPUs and 0.5 GPUs, and the cluster holds 2 beside 2 shards of 0.5"),
        (
            {"gpus_per_shard": 1.5, "gpus_per_trainer": 1},
            "1 trainers of 1 CPUs and 1 GPUs, and the cluster holds 0 beside 1 shards",
        ),
    ):
        with pytest.raises(ClusterError, match=words):
            plan_shards(range(4), cluster.model_copy(update=changes))
    apart = cluster.model_copy(update={"gpus_per_shard": 1, "gpus_per_trainer": 1, "autoscaling": True})
    too_much = plan_shards(range(4), apart)
    with pytest.raises(ClusterError, match=r"each on one node, do not fit the cluster's .*GPU: 2"):
        Reservation.make(too_much, apart.model_copy(update={"autoscaling": False}))
    if not torch.cuda.is_available():
        folder, space, tokens = parent
        step = Store(str(tmp_path)).artifact("library", {}, {})
        with pytest.raises(ClusterError, match="sees no GPU in a process that was given 0.5"):
            library_stream.build_library(folder, space, LIBRARY, cluster, tokens, 0, step, Quiet())
        assert not step.names()


def test_an_interrupt_while_room_is_waited_for_leaves_nothing_reserved(several_nodes, monkeypatch):
    several_nodes.add(num_cpus=1)

    def interrupted(group, timeout_s):
        assert ray.get(group.ready(), timeout=240)
        raise KeyboardInterrupt

    monkeypatch.setattr(PlacementGroup, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Reservation.make([ShardPlan(range(4), ((0, 1, 2, 3),))], CLUSTER)
    until(lambda: ray.available_resources().get("CPU") == 1, "what was reserved is free again")


DRIVER = """
import json, os, time
import ray
from actors import block_trainer, library_stream

class Watched(block_trainer.Trainer):
    def step(self, position, *args):
        before = {t.index: t.position for t in self.group.trainers}
        time.sleep(0.15 if 3 in before else 0.03)
        if 3 in before and position == LAST:
            time.sleep(HOLD_S)
        loss = super().step(position, *args)
        with open(LOG, "a") as file:
            for t in self.group.trainers:
                if t.position > before[t.index]:
                    file.write(json.dumps([t.index, t.position, os.getpid()]) + chr(10))
        return loss

library_stream.BlockTrainer = ray.remote(max_restarts=-1, max_task_retries=0)(Watched)
from jobs.app import main
main("build-library")
"""


@pytest.mark.wide  # a run from end to end that is killed in its library is in test_jobs.py
@pytest.mark.parametrize("moments", [("published",), ("somewhere", "published")])
def test_a_driver_killed_at_any_moment_goes_on_from_the_last_checkpoints(several_nodes, parent, tmp_path, moments):
    """Somewhere in training, and when one layer is published and another is not."""
    several_nodes.add(num_cpus=2)
    folder, _, _ = parent
    text = tmp_path / "train.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 100)
    settings = [
        *("profile.scenario.input_tokens=16", "profile.scenario.output_tokens=4"),
        *("data.sequence_length=16", "space.attention=[gqa:1,noop]", "space.ffn=[ffn:24]"),
        *(f"library.{name}={value}" for name, value in LIBRARY.model_dump(mode="json", exclude_defaults=True).items()),
        *("cluster.num_shards=1", f"cluster.address={ray.get_runtime_context().gcs_address!r}"),
        *(f"parent={folder}", f"data.train={text}"),
    ]
    run = Run(load(None, None, (*settings, f"store={tmp_path / 'store'}")), Quiet())
    serial = Store(str(tmp_path)).artifact("library", {"by": "one process"}, {})
    torch.set_num_threads(1)
    run.done("tokens")
    serial = build_serially(folder, run.space, LIBRARY, read(run)[0], 0, serial, Quiet())

    def started(number, moment):
        log = tmp_path / f"trained_{number}.jsonl"
        words = [word for setting in (*settings, f"store={tmp_path / 'store'}") for word in ("--set", setting)]
        hold_s = 20 if moment == "published" else 0  # so that the last layers are not done either before the kill is
        code = f"LOG, LAST, HOLD_S = {str(log)!r}, {Schedule.of(LIBRARY).positions - 1}, {hold_s}\n{DRIVER}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return log, subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT, env=environment, stderr=subprocess.PIPE)

    def library():
        found = [path.name.partition("-")[2] for path in (tmp_path / "store").glob("library-*")]
        step = Store(str(tmp_path / "store")).artifact("library", {}, {})
        step.key = found[0] if found else "none"
        return step

    rng = random.Random(5)
    somewhere = rng.randrange(4, 4 * 25)
    expected = dict.fromkeys(range(4), 0)
    at = {
        "somewhere": lambda log: len(lines(log)) >= somewhere,
        "published": lambda log: sum(n.startswith("layer_000.") for n in library().names()) == 3,
    }
    for number, moment in enumerate((*moments, "the end")):
        due = at.get(moment)
        before = {name: os.stat(library().path(name)).st_mtime_ns for name in library().names() if name.startswith("layer_")}
        log, driver = started(number, moment)
        try:
            if due:
                until(lambda: driver.poll() is not None or due(log), "trained so far", 300)  # noqa: B023  (called at once)
                assert driver.poll() is None, driver.stderr.read().decode()
                driver.send_signal(signal.SIGKILL)
            else:
                assert driver.wait(300) == 0, driver.stderr.read().decode()
        finally:
            driver.kill()
            driver.wait()
        until(lambda: not any(psutil.pid_exists(pid) for *_, pid in lines(log)), "trainers end with their driver")  # noqa: B023
        trained = {layer: [position for i, position, _ in lines(log) if i == layer] for layer in range(4)}
        for layer, begin in expected.items():
            assert trained[layer] == ([] if begin is None else list(range(begin, begin + len(trained[layer])))), (number, layer)
        assert {name: os.stat(library().path(name)).st_mtime_ns for name in before} == before
        there = library().names()
        positions = {layer: [] for layer in range(4)}
        for entry in run.space.entries():
            if variant_file(*entry) not in there:
                file = checkpoint_file(*entry)
                known = int(library().read_tensors(file)[1]["position"]) if library().exists(file) else -1
                positions[entry[0]].append(known)
        expected = {layer: min(known) + 1 if known else None for layer, known in positions.items()}
        if moment == "published":
            assert None in expected.values() and expected[3] is not None, "one layer is finished, another is not"
    assert_same(serial, Library(library()))
