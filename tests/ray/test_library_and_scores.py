"""On Ray the library and the scores are those of one process, whatever dies on the way."""

import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from packed_text import SEPARATOR, packed_ids
from small_models import save_parent
from waiting import until

from actors import library_stream, scoring
from actors.parent_pipelines import ParentPipelines
from actors.placement import runs
from actors.reservation import plan_shards
from puzzle_ray.artifacts import SearchSpace
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.data.order import Tokens
from puzzle_ray.distill.library import Library, build_serially, carry_over
from puzzle_ray.distill.settings import BlockLoss, EarlyStop, LibraryConfig
from puzzle_ray.errors import ClusterError
from puzzle_ray.models.blocks import load_stack
from puzzle_ray.models.child import read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.progress import Quiet
from puzzle_ray.scoring.replacements import all_replacements
from puzzle_ray.scoring.serial import score_serially
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

CONFIG = LibraryConfig(tokens=960, calibration_tokens=64, validation_tokens=64, micro_batch_tokens=32, checkpoint_every=4)
CLUSTER = ClusterConfig(num_shards=2, blocks_per_trainer=2, placement_timeout_s=240, step_timeout_s=120)
SPACE = (("gqa:1", "linear", "noop"), ("ffn:24", "noop"))
EVERYTHING = {
    "compute_dtype": "bfloat16",
    "loss": BlockLoss(subblock=0.5, cosine=0.5),
    "early_stop": EarlyStop(min_improvement=0.3, window=2, patience=2),
    "gradient_accumulation": 2,
    "learning_rate": "auto",
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = save_parent(tmp_path_factory.mktemp("parent"), num_hidden_layers=4, vocab_size=VOCAB_SIZE + 7)
    byte_tokenizer().save_pretrained(folder)
    space = search_space(read_config(folder), *SPACE, 8)
    rng = np.random.default_rng(0)
    tokens = Tokens(rng.integers(0, 96, (64, 16), dtype=np.int32))
    store = Store(str(tmp_path_factory.mktemp("store")))
    torch.set_num_threads(1)
    serial = build_serially(str(folder), space, CONFIG, tokens, 0, store.artifact("library", {"by": "one process"}, {}), Quiet())
    return folder, space, tokens, store, serial


@pytest.fixture(scope="module")
def coupled(setting):
    """The same parent, its pairs trained as wholes, in bfloat16, with all terms of the loss, at rates that are found by trials, and
    stopped when they are flat.

    Its text is of short documents that do not see each other.
    """
    folder, space, _, store, _ = setting
    tokens = Tokens(packed_ids(64, 16).numpy().astype(np.int32), separator=SEPARATOR)
    narrow = tuple(
        replace(layer, attention=("parent", "gqa:1"), ffn=("parent", "ffn:24"), coupled=True) for layer in space.layers
    )
    config = CONFIG.model_copy(update=EVERYTHING)
    step = store.artifact("library", {"by": "one process, coupled"}, {})
    serial = build_serially(str(folder), SearchSpace(narrow), config, tokens, 0, step, Quiet())
    assert step.facts()["coupled"] and step.facts()["stopped_early"] > 0
    return folder, SearchSpace(narrow), tokens, store, serial


def assert_same(a: Library, b: Library) -> None:
    assert a.rows() == b.rows() and a.curves() == b.curves()
    for name in a.artifact.names():
        if name.endswith(".safetensors"):
            x, y = a.artifact.read_tensors(name)[0], b.artifact.read_tensors(name)[0]
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), name


class At(Quiet):
    """Calls `act` once, when `position` micro-batches are done."""

    def __init__(self, position, act):
        self.position, self.act, self.done, self.then = position, act, 0, None

    def stage(self, name, total, unit):
        from contextlib import contextmanager

        @contextmanager
        def opened():
            yield self

        return opened()

    def advance(self, count=1, **facts):
        self.done += count
        if self.done >= self.position and self.act:
            act, self.act = self.act, None
            act()
        if self.then:
            self.then.advance(count)


def build(setting, name, progress=None, config=CONFIG, **changes):
    folder, space, tokens, store, _ = setting
    step = store.artifact("library", {"by": name}, {})
    cluster = CLUSTER.model_copy(update=changes)
    return library_stream.build_library(str(folder), space, config, cluster, tokens, 0, step, progress or Quiet())


def score(setting, name, config, progress=None):
    folder, space, tokens, store, library = setting
    step = store.artifact("scores", {"by": name}, {})
    return scoring.score_blocks(str(folder), space, library.artifact, config, CLUSTER, tokens, step, progress or Quiet())


def score_in_one_process(setting, config, name):
    folder, space, tokens, store, library = setting
    model_config = read_config(folder)
    stack = load_stack(folder, describe(model_config), model_config, 0, 4, torch.float32)
    texts = tokens.first(config.tokens, config.micro_batch_tokens // 16)
    step = store.artifact("scores", {"by": name}, {})
    return score_serially(stack, texts, space, config, step, library.states, Quiet(), separator=tokens.separator)


def test_library_and_scores_equal_one_processes_and_no_actor_outlives_its_stage(local_ray, setting, coupled):
    """The scores are of pairs that were trained as wholes, three at a time."""
    assert_same(setting[-1], build(setting, "ray"))
    cpus = ray.cluster_resources()["CPU"]
    until(lambda: ray.available_resources().get("CPU") == cpus, "no trainer or shard holds a CPU", 20)
    config = ScoringConfig(granularity="block", tokens=64, micro_batch_tokens=32, candidate_batch=3)
    found = score(coupled, "ray", config)
    assert found == score_in_one_process(coupled, config, "serial")
    assert len({(row.layer, row.attention, row.ffn) for row in found.rows}) == 4 * 3
    until(lambda: ray.available_resources().get("CPU") == cpus, "no shard holds a CPU", 20)
    assert threading.active_count() < 50


def test_killing_a_shard_and_a_trainer_and_stopping_the_driver_change_nothing(local_ray, coupled, monkeypatch):
    """Of one library, of pairs trained as wholes. What was done before the driver was stopped is not done again.

    Three layers are taken from an earlier library. The last one has a trainer before the stop, and two after it.
    """
    setting, config = coupled, CONFIG.model_copy(update=EVERYTHING)
    streams, killed = [], []
    start = library_stream.open_stream
    monkeypatch.setattr(library_stream, "open_stream", lambda *a: streams.append(start(*a)) or streams[-1])

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    def kill(actors):
        killed.append(ray.get(actors[0].pid.remote(), timeout=240))
        os.kill(killed[-1], signal.SIGKILL)

    carry_over(setting[-1].artifact, [0, 1, 2], setting[1], setting[3].artifact("library", {"by": "all die"}, {}))
    with pytest.raises(Stop):
        build(setting, "all die", At(9, stop), config)
    seen = At(15, lambda: kill(streams[-1].trainers))
    seen.then = At(95, lambda: kill(streams[-1].shards))  # the trials end with 84
    library = build(setting, "all die", seen, config, blocks_per_trainer="auto", trainers_per_layer=2)
    assert [len(stream.trainers) for stream in streams] == [1, 2] and len(killed) == 2
    assert_same(setting[-1], library)
    assert seen.done == 116, "counted from the checkpoint, shown as a whole"


def test_shards_with_their_trainers_in_one_process_and_one_of_them_killed_change_nothing(local_ray, setting, monkeypatch):
    streams = []
    start = library_stream.open_stream
    monkeypatch.setattr(library_stream, "open_stream", lambda *a: streams.append(start(*a)) or streams[-1])

    def kill():
        (stream,) = streams
        assert stream.shards == stream.trainers and len(stream.shards) == 2
        os.kill(ray.get(stream.shards[0].pid.remote(), timeout=240), signal.SIGKILL)

    seen = At(15, kill)
    assert_same(setting[-1], build(setting, "colocated", seen, colocate=True))
    assert seen.act is None and seen.done == 36


def test_killing_a_shard_while_scoring_changes_nothing(local_ray, setting, monkeypatch):
    """Of candidates that are estimated first; the promising ones are scored exactly, each only as long as it is in doubt."""
    doubts = {"racing": True, "racing_stderr": 0.05, "shortlist": "fisher", "shortlist_keep": 0.5, "fisher_samples": 1}
    config = ScoringConfig(granularity="subblock", tokens=256, micro_batch_tokens=64, candidate_batch=2, **doubts)
    pipelines = []
    start = ParentPipelines._start_one

    def started(self, options):
        pipelines.append(start(self, options))
        return pipelines[-1]

    monkeypatch.setattr(ParentPipelines, "_start_one", started)

    def kill():
        os.kill(ray.get(pipelines[0][1][-1].pid.remote(), timeout=240), signal.SIGKILL)

    assert score(setting, "killed", config, At(3, kill)) == score_in_one_process(setting, config, "serial, in doubt")
    assert pipelines


def test_items_scored_when_they_are_asked_for_have_the_scores_of_the_stage_and_are_kept(local_ray, setting):
    """Whoever asks and in whatever company: one at a time, as with `candidate_batch` 1."""
    folder, space, tokens, store, library = setting
    config = ScoringConfig(granularity="block", tokens=64, micro_batch_tokens=32, candidate_batch=3)
    alone = score_in_one_process(setting, config.model_copy(update={"candidate_batch": 1}), "serial, alone")
    items, step = all_replacements(space, "block"), store.artifact("settled", {}, {})
    arguments = (str(folder), space, library.artifact, config, CLUSTER, tokens, step, Quiet())
    with scoring.scoring(*arguments) as score:
        found = score([items[7], items[2]]) + score([items[3], items[2]])
    asked = [items[i] for i in (7, 2, 3, 2)]
    assert found == [row for item in asked for row in alone.rows if (row.layer, row.attention, row.ffn) == of(item)]
    with scoring.scoring(*arguments[:4], CLUSTER.model_copy(update={"placement_timeout_s": 0.001}), *arguments[5:]) as score:
        assert score(asked) == found, "nothing is started for what is there"


def of(item) -> tuple[int, str, str]:
    return item.layer, item.choice.attention, item.choice.ffn


def test_actors_that_find_no_place_are_an_error_that_says_what_there_is(local_ray, setting):
    with pytest.raises(ClusterError, match="no node can hold a block trainer with CPU: 64; the cluster has {CPU: 4}"):
        build(setting, "too big", cpus_per_trainer=64)
    with pytest.raises(ClusterError, match="4 trainers of 2 CPUs, and the cluster holds 2"):
        build(setting, "too many", cpus_per_trainer=2, blocks_per_trainer=1)


def test_layers_are_spread_evenly_and_in_order(local_ray):
    def groups(layers, **changes):
        return [(list(plan.layers), [list(g) for g in plan.groups]) for plan in plan_shards(layers, ClusterConfig(**changes))]

    assert [list(r) for r in runs(5, 2)] == [[0, 1], [2, 3, 4]] and len(runs(3, 8)) == 3
    assert groups([0, 2, 5], blocks_per_trainer=2) == [([0, 1, 2], [[0, 2]]), ([3, 4, 5], [[5]])]
    assert groups(range(8)) == [([0, 1, 2, 3], [[0, 1], [2, 3]]), ([4, 5, 6, 7], [[4, 5], [6, 7]])]
    assert groups([4, 5], num_shards=2) == [([0, 1, 2], []), ([3, 4, 5], [[4], [5]])], "layers 0 to 3 are finished"
    assert groups([0, 1, 5], num_shards=2) == [([0, 1, 2], [[0], [1]]), ([3, 4, 5], [[5]])]


def test_where_there_are_more_shards_than_places_there_are_fewer_of_them(local_ray, capsys):
    plans = plan_shards(range(8), ClusterConfig(num_shards=3, cpus_per_trainer=2))
    assert [len(plan.groups) for plan in plans] == [1, 1]
    assert "2 shards in place of 3" in capsys.readouterr().err
