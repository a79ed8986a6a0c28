"""However a parent is cut into shards and its layers grouped over trainers, library and scores are those of one process, bit for bit.

`Shard` and `Trainer` are what the actors run. Here they are plain objects, driven in order; what goes from one to another is a
read-only copy, as it is in Ray's object store.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from packed_text import SEPARATOR, packed_ids
from small_models import save_parent

from actors.block_trainer import Trainer
from actors.colocated_shard import Colocated
from actors.parent_shard import EvaluationData, Shard
from actors.placement import runs
from actors.transport import packed_positions
from puzzle_ray.artifacts import LayerChoice, Scores, SearchSpace
from puzzle_ray.data.order import Tokens
from puzzle_ray.data.packing import positions_in_documents
from puzzle_ray.distill.library import Library, build_serially, finish_library
from puzzle_ray.distill.schedule import Schedule
from puzzle_ray.distill.settings import BlockLoss, EarlyStop, LibraryConfig
from puzzle_ray.evaluation.child_meter import ChildMeter
from puzzle_ray.models.blocks import load_stack
from puzzle_ray.models.child import read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.progress import Quiet
from puzzle_ray.scoring import fisher
from puzzle_ray.scoring.downstream import load_questions
from puzzle_ray.scoring.plan import chunks_of_rounds
from puzzle_ray.scoring.replacements import all_replacements, keep, merge_scores, replacement_groups, saved_score_rows
from puzzle_ray.scoring.serial import score_serially
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.scoring.shortlist import Shortlist, footprints
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

LAYERS, SEED, TRANSPORT = 4, 0, "object_store"
CONFIG = LibraryConfig(tokens=512, calibration_tokens=64, validation_tokens=64, micro_batch_tokens=32, checkpoint_every=4)
EVERYTHING = {
    "compute_dtype": "bfloat16",
    "loss": BlockLoss(subblock=0.5, cosine=0.5),
    "early_stop": EarlyStop(min_improvement=0.3, window=2, patience=2),
    "gradient_accumulation": 2,
}
SPACE = (("gqa:1", "linear", "noop"), ("ffn:24", "noop"))
TWO_BY_TWO = [(0, 1), (2, 3)]


@dataclass(frozen=True)
class Setting:
    folder: Path
    space: SearchSpace
    tokens: Tokens
    store: Store
    numbers: count

    def artifact(self, stage: str):
        """A new one."""
        return self.store.artifact(stage, {"number": next(self.numbers)}, {})

    def serially(self, config: LibraryConfig) -> Library:
        return build_serially(str(self.folder), self.space, config, self.tokens, SEED, self.artifact("library"), Quiet())


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    torch.set_num_threads(1)
    folder = save_parent(tmp_path_factory.mktemp("parent"), num_hidden_layers=LAYERS, vocab_size=VOCAB_SIZE + 7)
    byte_tokenizer().save_pretrained(folder)
    tokens = Tokens(np.random.default_rng(0).integers(0, 96, (64, 16), dtype=np.int32))
    space = search_space(read_config(folder), *SPACE, 8)
    return Setting(folder, space, tokens, Store(str(tmp_path_factory.mktemp("store"))), count())


@pytest.fixture(scope="module")
def library(setting) -> Library:
    return setting.serially(CONFIG)


@pytest.fixture(scope="module")
def pairs(setting) -> Setting:
    """The same parent, its pairs trained as wholes."""
    narrow = [
        replace(layer, attention=("parent", "gqa:1"), ffn=("parent", "ffn:24"), coupled=True) for layer in setting.space.layers
    ]
    return replace(setting, space=SearchSpace(tuple(narrow)))


@pytest.fixture(scope="module")
def pairs_library(pairs) -> Library:
    """In bfloat16, with all terms of the loss, and stopped where they are flat."""
    library = pairs.serially(CONFIG.model_copy(update=EVERYTHING))
    assert library.artifact.facts()["coupled"] and library.artifact.facts()["stopped_early"] > 0
    return library


def travelled(sent):
    """What arrives of arrays: copies that cannot be written to."""
    if isinstance(sent, np.ndarray):
        sent = sent.copy()
        sent.setflags(write=False)
        return sent
    return [travelled(part) for part in sent] if isinstance(sent, list) else sent


def micro_batch(setting: Setting, number: int):
    """(token ids, what goes along with their hidden states) of a micro-batch."""
    ids = setting.tokens.batch(SEED, number, 2)
    position_ids = packed_positions(positions_in_documents(ids, setting.tokens.separator))
    return ids.numpy(), {} if position_ids is None else {"position_ids": travelled(position_ids)}


def assert_same(a: Library, b: Library) -> None:
    assert a.rows() == b.rows() and a.curves() == b.curves()
    for name in a.artifact.names():
        if name.endswith(".safetensors"):
            x, y = a.artifact.read_tensors(name)[0], b.artifact.read_tensors(name)[0]
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), name


@pytest.fixture(scope="module")
def masked(setting) -> Setting:
    """The same parent, and text of short documents that do not see each other."""
    text = Tokens(packed_ids(64, 16).numpy().astype(np.int32), separator=SEPARATOR)
    return replace(setting, tokens=text)


@pytest.fixture(scope="module")
def masked_library(masked) -> Library:
    return masked.serially(CONFIG)


# --- the library


def stream(
    setting: Setting, config: LibraryConfig, num_shards: int, grouping, restart_at: int | None = None, then=None
) -> Library:
    """The library by shards and trainers. At position `restart_at` every one of them is lost and started again, or as `then` says.

    A grouping has of every trainer its layers, and behind them the part of their variants where it has not all.
    """
    parent, artifact, schedule = str(setting.folder), setting.artifact("library"), Schedule.of(config)

    def started():
        how = (config.parent_dtype, config.activation_dtype, 1, TRANSPORT)
        shards = [Shard(parent, layers.start, layers.stop, *how) for layers in runs(LAYERS, num_shards)]
        shares = [(group[:-1], group[-1]) if isinstance(group[-1], tuple) else (group, (0, 1)) for group in grouping]
        trainers = [Trainer(parent, ls, setting.space, config, artifact, 1, TRANSPORT, part=part) for ls, part in shares]
        return shards, list(zip([layers for layers, _ in shares], trainers, strict=True))

    shards, trainers = started()
    position = 0
    while position < schedule.positions:
        if position == restart_at:
            grouping = then or grouping
            shards, trainers = started()
            position, restart_at = min(trainer.last() for _, trainer in trainers) + 1, None
        entering, known = micro_batch(setting, schedule.data_number(position))
        hidden: list = []  # hidden[i] is the input of layer i
        for shard in shards:
            left = travelled(shard.forward(entering, **known))
            hidden += left if isinstance(left, list) else [left]
            entering = hidden[-1]
        for layers, trainer in trainers:
            indices = sorted({i for layer in layers for i in (layer, layer + 1)})
            trainer.step(position, indices, *[hidden[i] for i in indices], **known)
        position += 1
    return finish_library(setting.space, artifact)


@pytest.mark.parametrize(
    ("num_shards", "grouping"),
    [(2, TWO_BY_TWO), (1, [(0, 1, 2, 3)]), (4, [(0,), (1,), (2,), (3,)]), (3, [(3, 0), (2,), (1,)])],
    ids=str,
)
def test_shards_and_the_grouping_of_layers_change_nothing(setting, library, num_shards, grouping):
    assert_same(library, stream(setting, CONFIG, num_shards, grouping))


def stream_colocated(setting: Setting, config: LibraryConfig, num_shards: int, restart_at: int | None = None) -> Library:
    """The library by shards that train their own layers."""
    parent, artifact, schedule = str(setting.folder), setting.artifact("library"), Schedule.of(config)

    def started():
        how = (config.parent_dtype, config.activation_dtype, 1, TRANSPORT)
        of_shards = runs(LAYERS, num_shards)
        return [
            Colocated(
                (parent, layers.start, layers.stop, *how),
                (parent, tuple(layers), setting.space, config, artifact, 1, TRANSPORT),
                layers is of_shards[-1],
            )
            for layers in of_shards
        ]

    shards = started()
    position = 0
    while position < schedule.positions:
        if position == restart_at:
            shards = started()
            position, restart_at = min(shard.last() for shard in shards) + 1, None
        entering, known = micro_batch(setting, schedule.data_number(position))
        for shard in shards:
            left, _ = shard.forward_and_train(position, entering, **known)
            entering = None if left is None else travelled(left)
        assert entering is None, "nothing reads the last layer's output outside its process"
        position += 1
    sent = [shard.usage().sent_bytes for shard in shards]
    assert sent[-1] == 0 and all(sent[:-1])
    return finish_library(setting.space, artifact)


@pytest.mark.parametrize(("num_shards", "restart_at"), [(1, None), (3, 14)])
def test_trainers_in_their_shards_processes_change_nothing(setting, library, num_shards, restart_at):
    assert_same(library, stream_colocated(setting, CONFIG, num_shards, restart_at))


def test_they_round_to_16_bits_as_if_states_had_travelled(pairs):
    config = CONFIG.model_copy(update=EVERYTHING | {"activation_dtype": "bfloat16", "parent_dtype": "bfloat16"})
    assert_same(pairs.serially(config), stream_colocated(pairs, config, 2))


def test_documents_are_told_apart_wherever_shards_end(masked, masked_library):
    assert_same(masked_library, stream(masked, CONFIG, 2, SPLIT, 11, TWO_BY_TWO))
    assert_same(masked_library, stream_colocated(masked, CONFIG, 3, 14))


@pytest.mark.parametrize("restart_at", [1, 14])
def test_what_is_started_again_goes_on_from_its_checkpoint(setting, library, restart_at):
    assert_same(library, stream(setting, CONFIG, 2, TWO_BY_TWO, restart_at))


SPLIT = [(0, (0, 2)), (0, (1, 2)), (1,), (2, (0, 3)), (2, (1, 3)), (2, (2, 3)), (3,)]  # more trainers than layers


def test_a_layers_variants_are_split_over_trainers_and_others_go_on_from_their_checkpoints(setting, library):
    assert_same(library, stream(setting, CONFIG, 2, SPLIT, 11, TWO_BY_TWO))


def test_pairs_with_every_option_are_the_same_and_are_split_in_the_middle_of_an_optimizer_step(pairs, pairs_library):
    """Checkpoints are of ends of steps; position 13 is in the middle of one."""
    config = CONFIG.model_copy(update=EVERYTHING | {"checkpoint_every": 3})
    assert_same(pairs_library, stream(pairs, config, 1, TWO_BY_TWO, 13, [(n, (m, 2)) for n in range(LAYERS) for m in range(2)]))


def test_what_travels_in_16_bits_is_rounded_alike_wherever_shards_end(setting, library):
    """The parent computes in 16 bits too: the same numbers from one process, one shard and three."""
    config = CONFIG.model_copy(update={"activation_dtype": "bfloat16", "parent_dtype": "bfloat16"})
    serial = setting.serially(config)
    assert serial.rows() != library.rows()
    for num_shards in (1, 3):
        assert_same(serial, stream(setting, config, num_shards, TWO_BY_TWO))


# --- scores


class Pipeline:
    """A parent cut into shards. With `forgetful`, every shard is started again before it does anything."""

    def __init__(
        self, setting: Setting, library: Library, data: EvaluationData, num_shards: int, forgetful: bool, dtype: str
    ) -> None:
        self.setting, self.library, self.data, self.forgetful, self.dtype = setting, library, data, forgetful, dtype
        self.layers = runs(LAYERS, num_shards)
        self.shards = [self.started(layers) for layers in self.layers]
        self.batches: tuple[int, ...] = ()
        self.entering: list[list] = []

    def turn_to(self, batches):
        if batches != self.batches:
            self.batches, self.entering = batches, [[]]
            for shard in self.shards:
                self.entering.append(travelled(shard.run_parent(batches, self.data, self.entering[-1])))

    def started(self, layers: range) -> Shard:
        return Shard(str(self.setting.folder), layers.start, layers.stop, self.dtype, self.dtype, 1, TRANSPORT)

    def shard(self, n: int) -> Shard:
        return self.started(self.layers[n]) if self.forgetful else self.shards[n]

    def score(self, task, chunk):
        self.turn_to(chunk.batches)
        first = next(n for n, layers in enumerate(self.layers) if task.layer in layers)
        given = (self.batches, self.data)
        out = travelled(self.shard(first).exchange(task, self.library.artifact, *given, self.entering[first]))
        for n in range(first + 1, len(self.shards)):
            out = travelled(self.shard(n).suffix(task, out, *given, self.entering[n]))
        return out

    def estimate(self, chunk, config: ScoringConfig):
        self.turn_to(chunk.batches)
        found, gradients = [], None
        for n in reversed(range(len(self.shards))):
            arguments = (self.setting.space, config, self.library.artifact, self.batches, self.data, self.entering[n])
            own, gradients = travelled(list(self.shard(n).estimate(self.batches, gradients, *arguments)))
            found.append(own)
        return found


def evaluation(setting: Setting, config: ScoringConfig):
    """(texts, questions)"""
    questions = load_questions(str(setting.folder), config, read_config(setting.folder))
    return setting.tokens.first(config.tokens, config.micro_batch_tokens // 16), questions


def score_by_shards(
    setting: Setting, library: Library, config: ScoringConfig, num_shards: int, forgetful=False, limit_bytes=10**9
) -> Scores:
    """The scoring stage, one piece of work after the other, in chunks of at most `limit_bytes` at a byte per token."""
    texts, questions = evaluation(setting, config)
    data = EvaluationData([batch.numpy() for batch in texts], questions, setting.tokens.separator)
    pipeline, artifact = Pipeline(setting, library, data, num_shards, forgetful, config.dtype), setting.artifact("scores")
    batch_tokens = [batch.size for batch in (*data.texts, *(q.input_ids for q in questions))]
    wanted, shortlist = all_replacements(setting.space, config.granularity), None
    if config.shortlist == "fisher":
        for chunk in chunks_of_rounds([tuple(range(len(texts)))], batch_tokens, 1, limit_bytes):
            fisher.save_estimates(artifact, chunk.batches, pipeline.estimate(chunk, config))
        model_config = read_config(setting.folder)
        weights = footprints(setting.space, describe(model_config), model_config)
        tokens = sum(batch.size for batch in data.texts)
        shortlist = Shortlist.of(
            wanted, fisher.load_estimates([len(ids) for ids in texts], artifact), tokens, weights, setting.space, config
        )
        wanted = list(shortlist.exact)
    groups = replacement_groups(wanted, config, len(texts), len(questions))
    for chunk in chunks_of_rounds(groups[0].rounds, batch_tokens, 1, limit_bytes):
        for group in groups:
            if (task := group.task(chunk)) is not None:
                group.add(task, pipeline.score(task, chunk))
                keep(group, task, artifact)
    assert all(group.finished for group in groups) and not artifact.names("parts")
    rows = saved_score_rows(wanted, artifact)
    return merge_scores(rows + shortlist.rows(rows) if shortlist else rows, config, artifact)


def score_in_one_piece(setting: Setting, library: Library, config: ScoringConfig) -> Scores:
    model_config = read_config(setting.folder)
    stack = load_stack(setting.folder, describe(model_config), model_config, 0, LAYERS, getattr(torch, config.dtype))
    texts, questions = evaluation(setting, config)
    how = (library.states, Quiet(), questions, setting.tokens.separator)
    return score_serially(stack, texts, setting.space, config, setting.artifact("scores"), *how)


@pytest.fixture(scope="module")
def questions_file(tmp_path_factory) -> str:
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
    "half precision": {"granularity": "block", "dtype": "bfloat16", "shortlist": "fisher"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_scores_are_those_of_one_piece_wherever_shards_end(setting, library, questions_file, name):
    options = {"tokens": 64, "micro_batch_tokens": 32} | OPTIONS[name]
    if "downstream" in options:
        options["downstream"] = questions_file
    config = ScoringConfig(**options)
    whole = score_in_one_piece(setting, library, config)
    for num_shards in (1, 2):
        assert score_by_shards(setting, library, config, num_shards) == whole
    one_batch = config.micro_batch_tokens
    assert score_by_shards(setting, library, config, 2, limit_bytes=one_batch) == whole, "chunks of one batch change nothing"
    if name == "racing":
        assert len({row.tokens for row in whole.rows}) > 1
    if name in ("shortlist", "half precision"):
        assert {row.tokens for row in whole.rows if row.metric == "kl"} == {0, 64}, "some are exact, some estimated"
    if name == "downstream":
        assert {row.metric for row in whole.rows} >= {"downstream", "kl"}


@pytest.mark.parametrize("options", [{"candidate_batch": 3}, {"shortlist": "fisher"}], ids=str)
def test_documents_are_told_apart_by_all_shards_that_score(masked, masked_library, options):
    config = ScoringConfig(granularity="block", tokens=64, micro_batch_tokens=32, **options)
    whole = score_in_one_piece(masked, masked_library, config)
    assert score_by_shards(masked, masked_library, config, 2, forgetful="shortlist" in options) == whole
    crossing = replace(masked, tokens=replace(masked.tokens, separator=None))
    assert score_in_one_piece(crossing, masked_library, config).rows != whole.rows


@pytest.mark.parametrize("shortlist", ["none", "fisher"])
def test_shards_that_are_started_again_run_the_parent_again_and_score_the_same(setting, library, shortlist):
    config = ScoringConfig(granularity="subblock", tokens=64, micro_batch_tokens=32, shortlist=shortlist, racing=True)
    assert score_by_shards(setting, library, config, 2, forgetful=True) == score_in_one_piece(setting, library, config)


def test_scores_of_pairs_are_those_of_one_piece(pairs, pairs_library):
    config = ScoringConfig(granularity="block", tokens=64, micro_batch_tokens=32)
    whole = score_in_one_piece(pairs, pairs_library, config)
    assert score_by_shards(pairs, pairs_library, config, 2) == whole
    assert len({(row.layer, row.attention, row.ffn) for row in whole.rows}) == 3 * LAYERS


@pytest.mark.parametrize(("num_shards", "masked"), [(1, False), (2, False), (4, False), (2, True)])
def test_children_are_measured_alike_wherever_shards_end_and_whatever_is_remembered(setting, library, num_shards, masked):
    model_config = read_config(setting.folder)
    stack = load_stack(setting.folder, describe(model_config), model_config, 0, LAYERS, torch.float32)
    batches, parent = setting.tokens.first(64, 2), LayerChoice()
    separator = int(batches[0][0, 7]) if masked else None
    a, b, c = LayerChoice("gqa:1", "ffn:24"), LayerChoice(ffn="noop"), LayerChoice("linear")
    children = [(a, b, parent, c), (a, b, parent, parent), (a, parent, parent, parent), (b, c, a, a), (b, c, a, parent)]
    whole = ChildMeter(stack, library, batches, separator=separator)
    expected = [whole.measure(child) for child in children]
    assert len(set(expected)) == len(children)
    assert [ChildMeter(stack, library, batches, 0, separator).measure(child) for child in children] == expected
    unmasked = ChildMeter(stack, library, batches).measure(children[0])
    assert (unmasked == expected[0]) == (not masked)
    one_batch = batches[0].numel() * 32 * 4 * (LAYERS + 1)
    partly = ChildMeter(stack, library, batches, one_batch, separator)
    assert [partly.measure(child) for child in children] == expected and [bool(x) for x in partly.inputs] == [True, False]

    shards = [Shard(str(setting.folder), x.start, x.stop, "float32", "float32", 1, TRANSPORT) for x in runs(LAYERS, num_shards)]
    ids = [batch.numpy() for batch in batches]
    entering: list = [[]]
    for shard in shards:
        entering.append(travelled(shard.remember_parent(library.artifact, ids, entering[-1], separator)))
    found = []
    for number, child in enumerate(children):
        if number == 3:  # one of them is lost
            shards[-1] = Shard(str(setting.folder), *spans(shards[-1]), "float32", "float32", 1, TRANSPORT)
        out: list = []
        for shard, parents in zip(shards, entering, strict=False):
            out = travelled(shard.run_child(child, out, library.artifact, ids, parents, separator))
        found.append(out)
    assert found == expected


def spans(shard: Shard) -> tuple[int, int]:
    return shard.stack.first, shard.stack.last


def test_runs_are_even_and_in_order():
    assert [list(run) for run in runs(5, 2)] == [[0, 1], [2, 3, 4]] and len(runs(3, 8)) == 3
