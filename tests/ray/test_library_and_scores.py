"""On Ray the library and the scores are those of one process, whatever dies on the way."""

import json
import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from small_models import save_parent

from actors import library_stream, scoring_pool
from actors.data_plane import plan_shards
from actors.placement import runs
from puzzle_ray.artifacts import SearchSpace
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.data.order import Tokens
from puzzle_ray.distill.library import Library, build_serially
from puzzle_ray.distill.settings import BlockLoss, EarlyStop, LibraryConfig
from puzzle_ray.errors import ClusterError
from puzzle_ray.models.blocks import load_stack
from puzzle_ray.models.child import read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.progress import Quiet
from puzzle_ray.scoring.downstream import load_questions
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
    "early_stop": EarlyStop(min_improvement=0.3, window=4, patience=2),
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
    """The same parent, its pairs trained as wholes, in bfloat16, with all terms of the loss, and stopped when they are flat."""
    folder, space, tokens, store, _ = setting
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
        self.position, self.act, self.done = position, act, 0

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


def build(setting, name, progress=None, config=CONFIG, **changes):
    folder, space, tokens, store, _ = setting
    step = store.artifact("library", {"by": name}, {})
    cluster = CLUSTER.model_copy(update=changes)
    return library_stream.build_library(str(folder), space, config, cluster, tokens, 0, step, progress or Quiet())


def test_the_library_equals_one_processes(local_ray, setting):
    assert_same(setting[-1], build(setting, "ray"))


def test_grouping_of_layers_changes_nothing(local_ray, setting):
    assert_same(setting[-1], build(setting, "one each", num_shards=1, blocks_per_trainer=4))


def test_what_travels_in_16_bits_is_rounded_alike_wherever_shards_end(local_ray, setting):
    """The parent computes in 16 bits too: the same numbers from one process, one shard and three."""
    config = CONFIG.model_copy(update={"activation_dtype": "bfloat16", "parent_dtype": "bfloat16", "tokens": 320})
    folder, space, tokens, store, exact = setting
    serial = build_serially(str(folder), space, config, tokens, 0, store.artifact("library", {"by": "16 bits"}, {}), Quiet())
    assert serial.rows() != exact.rows()
    for num_shards in (1, 3):
        assert_same(serial, build(setting, f"16 bits, {num_shards}", config=config, num_shards=num_shards))


@pytest.mark.parametrize("victim", ["trainers", "shards", "trainers of pairs"])
def test_killing_a_process_changes_nothing(local_ray, setting, coupled, victim, monkeypatch):
    streams = []
    setting, config = (coupled, CONFIG.model_copy(update=EVERYTHING)) if "pairs" in victim else (setting, CONFIG)
    victims = victim.split()[0]
    start = library_stream.open_stream
    monkeypatch.setattr(library_stream, "open_stream", lambda *a: streams.append(start(*a)) or streams[-1])
    killed = []

    def kill():
        pid = ray.get(getattr(streams[-1], victims)[0].pid.remote(), timeout=30)
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    library = build(setting, f"{victim} die", At(15, kill), config)
    assert len(killed) == 1
    assert_same(setting[-1], library)


def test_a_driver_that_is_stopped_continues_where_it_was(local_ray, setting):
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with pytest.raises(Stop):
        build(setting, "stopped", At(17, stop))
    seen = At(10**9, None)
    library = build(setting, "stopped", seen)
    assert_same(setting[-1], library)
    assert seen.done == 36  # 34 positions... counted from the checkpoint, shown as a whole


def score_in_one_process(setting, config, name):
    folder, space, tokens, store, library = setting
    model_config = read_config(folder)
    stack = load_stack(folder, describe(model_config), model_config, 0, 4, torch.float32)
    texts = tokens.first(config.tokens, config.micro_batch_tokens // 16)
    questions = load_questions(str(folder), config, 128)
    return score_serially(
        stack, texts, space, config, store.artifact("scores", {"by": name}, {}), library.states, Quiet(), questions
    )


@pytest.fixture(scope="module")
def questions_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "q.jsonl"
    rows = [{"query": f"question {n}", "choices": ["yes", "no", "not at all"], "gold": n % 3} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


OPTIONS = {
    "plain": {"granularity": "block"},
    "together": {"granularity": "block", "candidate_batch": 3},
    "racing": {"racing": True, "racing_stderr": 0.05, "candidate_batch": 2, "tokens": 768, "micro_batch_tokens": 128},
    "shortlist": {"granularity": "block", "shortlist": "fisher", "shortlist_keep": 0.3, "fisher_samples": 2},
    "downstream": {"downstream": True, "metric": "downstream"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_scores_equal_one_processes(local_ray, setting, name, questions_file):
    folder, space, tokens, store, library = setting
    options = {"tokens": 64, "micro_batch_tokens": 32} | OPTIONS[name]
    if "downstream" in options:
        options["downstream"] = questions_file
    config = ScoringConfig(**options)
    step = store.artifact("scores", {"by": f"ray, {name}"}, {})
    on_ray = scoring_pool.score_blocks(str(folder), space, library.artifact, config, CLUSTER, tokens, step, Quiet())
    assert on_ray == score_in_one_process(setting, config, f"serial, {name}")
    if name == "racing":
        assert len({row.tokens for row in on_ray.rows}) > 1


def test_items_scored_when_they_are_asked_for_have_the_scores_of_the_stage_and_are_kept(local_ray, setting):
    """Whoever asks and in whatever company: one at a time, as with `candidate_batch` 1."""
    folder, space, tokens, store, library = setting
    config = ScoringConfig(granularity="block", tokens=64, micro_batch_tokens=32, candidate_batch=3)
    alone = score_in_one_process(setting, config.model_copy(update={"candidate_batch": 1}), "serial, alone")
    items, step = all_replacements(space, "block"), store.artifact("settled", {}, {})
    arguments = (str(folder), space, library.artifact, config, CLUSTER, tokens, step, Quiet())
    with scoring_pool.scoring(*arguments) as score:
        found = score([items[7], items[2]]) + score([items[3], items[2]])
    asked = [items[i] for i in (7, 2, 3, 2)]
    assert found == [row for item in asked for row in alone.rows if (row.layer, row.attention, row.ffn) == of(item)]
    with scoring_pool.scoring(*arguments[:4], CLUSTER.model_copy(update={"placement_timeout_s": 0.001}), *arguments[5:]) as score:
        assert score(asked) == found, "nothing is started for what is there"


def of(item) -> tuple[int, str, str]:
    return item.layer, item.choice.attention, item.choice.ffn


def test_scores_of_coupled_pairs_equal_one_processes(local_ray, coupled):
    folder, space, tokens, store, library = coupled
    config = ScoringConfig(granularity="block", tokens=64, micro_batch_tokens=32)
    step = store.artifact("scores", {"by": "ray, coupled"}, {})
    on_ray = scoring_pool.score_blocks(str(folder), space, library.artifact, config, CLUSTER, tokens, step, Quiet())
    assert on_ray == score_in_one_process(coupled, config, "serial, coupled")
    assert len({(row.layer, row.attention, row.ffn) for row in on_ray.rows}) == 4 * 3


@pytest.mark.parametrize("shortlist", ["none", "fisher"])
def test_killing_a_shard_while_scoring_changes_nothing(local_ray, setting, monkeypatch, shortlist):
    folder, space, tokens, store, library = setting
    config = ScoringConfig(granularity="subblock", tokens=64, micro_batch_tokens=32, shortlist=shortlist, racing=True)
    pipelines = []
    start = scoring_pool._Pipeline.start.__func__

    def started(cls, *args):
        pipelines.append(start(cls, *args))
        return pipelines[-1]

    monkeypatch.setattr(scoring_pool._Pipeline, "start", classmethod(started))

    def kill():
        os.kill(ray.get(pipelines[0].shards[-1].pid.remote(), timeout=30), signal.SIGKILL)

    def score(name, progress):
        return scoring_pool.score_blocks(
            str(folder),
            space,
            library.artifact,
            config,
            CLUSTER,
            tokens,
            store.artifact("scores", {"by": name, "shortlist": shortlist}, {}),
            progress,
        )

    assert score("killed", At(3, kill)) == score("undisturbed", Quiet())


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


def test_no_actor_outlives_its_stage(local_ray, setting):
    build(setting, "leaves nothing")
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]
    assert threading.active_count() < 50
