"""Blocks that are done out of order add up to what one process does in order; the text in flight has a bound."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer

from actors import tokenisers
from actors.data_plane import MANY_CHARACTERS, text_bytes
from actors.tokenisers import TextReader, _Flow, _Followed, _Lane
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.data import blocks
from puzzle_ray.data.blocks import Text, do_block
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.data.splits import save_tokens
from puzzle_ray.data.tokenising import Here
from puzzle_ray.errors import ClusterError
from puzzle_ray.store import Store

WORKERS = 3


class Kept:
    """Shards by name; writing one again takes its place."""

    def __init__(self):
        self.tokens = {}

    def write(self, split, number, tokens, facts):
        self.tokens[split, number] = tokens

    def read(self, split, number):
        return None


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("texts") / "a.jsonl", np.random.default_rng(0)
    rows = [{"text": f"{i} " + "".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(5, 90)))} for i in range(600)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def through(flow, tokenizer, shards, draw):
    """Runs lanes whose blocks end in an order that is drawn. Returns the blocks that were begun, in order."""
    begun, busy = [], {}

    def tokenise(artifact, block, room):
        if block is None:
            return None
        begun.append(block.number)
        assert block.number < flow.done.num_blocks + flow.most_open
        return list(block.read), do_block(shards, block, room, tokenizer)

    def remote(function):
        return SimpleNamespace(remote=function)

    worker = SimpleNamespace(tokenise=remote(tokenise), rest=remote(lambda: None))
    lanes = [_Lane() for _ in range(WORKERS)]
    busy = {n: flow.send(worker, lane) for n, lane in enumerate(lanes)}
    while busy:
        n = int(draw.choice(sorted(busy)))
        if flow.receive(lanes[n], busy.pop(n)):
            busy[n] = flow.send(worker, lanes[n])
    return begun


def new_reader(tokenizer):
    reader = object.__new__(TextReader)
    reader.tokenizer, reader.text, reader.blocks, reader.next = tokenizer, None, iter(()), 0
    reader.began, reader.steps = 1, 0
    return reader


LIMITS = [{"train": 10**6, "heldout": 10**6}, {"train": 9000, "heldout": 700}, {"all": 5001}, {"all": 10**6}]


@pytest.mark.parametrize("limits", LIMITS)
def test_blocks_in_any_order_are_the_blocks_of_one_process(text, limits, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", 700)
    tokenizer, draw = byte_tokenizer(), np.random.default_rng(0)
    wanted = Text.of(DataConfig(train=text, heldout_fraction=0.2), "train", limits)
    here = Kept()
    expected = Here(here, tokenizer).stream(wanted)
    assert expected.num_blocks > 5
    twice = 0
    for _ in range(6):
        there, told = Kept(), []
        handle = SimpleNamespace(block=SimpleNamespace(remote=new_reader(tokenizer).block))
        flow = _Flow(wanted, None, handle, 2 * WORKERS, told.append)
        begun = through(flow, tokenizer, there, draw)
        assert flow.done.counts == expected.counts and flow.done.by_source == expected.by_source
        assert all(np.array_equal(there.tokens[name], tokens) for name, tokens in here.tokens.items())
        assert len(told) == expected.num_blocks
        twice += len(begun) - len(set(begun))
    if max(limits.values()) < 10**6:
        assert twice, "what took more than there was room for was done again"
        assert all(sum(counts) <= limits[split] for split, counts in expected.counts.items())
    else:
        assert not twice and sorted(begun) == list(range(expected.num_blocks))


def test_a_reader_that_begins_anew_hands_out_the_same_blocks(text, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", 3000)
    wanted = Text.of(DataConfig(train=text), "train", {"all": 10**6})
    readers = [new_reader(byte_tokenizer()) for _ in range(2)]
    forwards = [readers[0].block(wanted, number) for number in range(4)]
    assert [readers[1].block(wanted, number) for number in (2, 0, 3)] == [forwards[number] for number in (2, 0, 3)]
    assert readers[1].block(wanted, 10**4) is None and readers[1].block(wanted, 1) == forwards[1]


class Answers:
    """Ray, as far as it is asked here: a call answers at once, and what is named in `late` is not there yet."""

    def __init__(self):
        self.late = set()

    def wait(self, refs, timeout=None, fetch_local=True):
        return [ref for ref in refs if ref not in self.late], []

    def get(self, ref, timeout):
        return ref


class StandIn:
    """A reader whose progress is told."""

    def __init__(self):
        self.now = (1, 0)
        self.progress = SimpleNamespace(options=lambda concurrency_group: SimpleNamespace(remote=lambda: self.now))
        self.block = SimpleNamespace(remote=lambda text, number: f"block {number}")


@pytest.fixture
def answers(monkeypatch):
    found = Answers()
    monkeypatch.setattr(tokenisers, "ray", found)
    return found


def test_who_waits_for_the_reader_waits_as_long_as_it_gets_on(text, answers):
    reader = StandIn()
    followed = _Followed(reader)
    flow = _Flow(Text.of(DataConfig(train=text), "train", {"all": 10**6}), None, reader, 2 * WORKERS, lambda n: None)
    worker = SimpleNamespace(tokenise=SimpleNamespace(remote=lambda *a: a), rest=SimpleNamespace(remote=lambda: None))
    lanes = [_Lane(), _Lane()]
    for lane in lanes:
        flow.send(worker, lane)
    answers.late = {"block 0", "block 1"}
    assert [flow.news(followed, lane) for lane in lanes] == [True, True], "each hears of it"
    assert [flow.news(followed, lane) for lane in lanes] == [False, False], "the reader stands still"
    reader.now = (1, 7)
    answers.late = {"block 1"}
    assert [flow.news(followed, lane) for lane in lanes] == [False, True], "who has its text is at work itself"
    for began, counts in ((2, True), (3, False), (4, False)):
        reader.now = (began, 5)
        assert flow.news(followed, lanes[1]) is counts, "a reader that dies again and again does not get on"
    reader.now = (1, 8)
    assert not flow.news(followed, _Lane()), "a lane at rest"


@pytest.mark.parametrize("stands_still_after", [30, None])
def test_an_answer_is_waited_for_as_long_as_the_reader_gets_on(answers, monkeypatch, stands_still_after):
    tokeniser, clock, reader = object.__new__(tokenisers.OnRay), [0.0], StandIn()
    tokeniser.cluster, tokeniser.followed, tokeniser.reader = ClusterConfig(step_timeout_s=10), _Followed(reader), reader
    reader.train_hash = SimpleNamespace(remote=lambda artifact: "hash")
    monkeypatch.setattr(tokenisers, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    wait = answers.wait

    def waiting(refs, timeout=None, fetch_local=True):
        clock[0] += timeout
        if stands_still_after is None or clock[0] < stands_still_after:
            reader.now = (1, int(clock[0]))
        answers.late = {"hash"} if clock[0] < 100 else set()
        return wait(refs)

    monkeypatch.setattr(answers, "wait", waiting)
    if stands_still_after is None:
        assert tokeniser.train_hash(None) == "hash" and clock[0] == 100
    else:
        with pytest.raises(ClusterError, match="tokens: the tokens were not read: nothing was read for 10 s; raise cluster.step"):
            tokeniser.train_hash(None)
        assert 39 <= clock[0] <= 42


def test_the_reader_counts_what_it_reads(text, tmp_path):
    reader = new_reader(byte_tokenizer())
    wanted = Text.of(DataConfig(train=text), "train", {"all": 10**6})
    assert reader.has_few_documents(wanted) and reader.progress() == (1, 600)
    reader.block(wanted, 1)
    assert reader.progress() == (1, 1200)
    artifact = Store(str(tmp_path)).artifact("tokens", {}, {})
    save_tokens(DataConfig(train=text, sequence_length=16), byte_tokenizer(), None, artifact)
    assert reader.train_hash(artifact) == artifact.facts()["train_sha256"] and reader.progress() == (1, 1201)


def test_the_text_in_flight_has_a_bound(text):
    config = DataConfig(train=text)
    assert text_bytes(config, 16) == 0, "little text is in no object store"
    asked = config.model_copy(update={"tokenise_workers": 2})
    assert text_bytes(asked, 16) == 6 * blocks.BLOCK_CHARACTERS == text_bytes(asked, 2)
    assert MANY_CHARACTERS >= 2 * blocks.BLOCK_CHARACTERS, "fewer blocks than two have no use for two workers"
