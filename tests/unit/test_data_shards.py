"""Token shards: the tokens of one piece, whatever the blocks; an interrupted run goes on behind the last one; few are open."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer

from puzzle_ray.data import blocks
from puzzle_ray.data import shards as token_shards
from puzzle_ray.data.documents import Piece
from puzzle_ray.data.order import Tokens
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.data.shards import OPEN_SHARDS, TokenShards
from puzzle_ray.data.splits import INDEX, TOKENS, load_tokens, save_tokens
from puzzle_ray.data.tokenising import Here, pack, tokenise, tokenise_into
from puzzle_ray.errors import Damaged, DataError
from puzzle_ray.store import Store

LENGTH = 16


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Files of rows: few documents, and more than a thousand."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for name, count in (("few", 40), ("many", 1200), ("other", 30)):
        rows = [{"text": "".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(5, 120)))} for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def configs(folder):
    few, many, other = (str(folder / f"{name}.jsonl") for name in ("few", "many", "other"))
    common = {"sequence_length": LENGTH}
    return {
        "held-out file": DataConfig(train=few, heldout=other, **common),
        "few documents": DataConfig(train=few, heldout_fraction=0.2, **common),
        "many documents": DataConfig(train=many, heldout_fraction=0.2, **common),
        "limits": DataConfig(train=many, heldout_fraction=0.2, max_train_tokens=9000, max_heldout_tokens=700, **common),
        "a limit of few": DataConfig(train=few, heldout_fraction=0.2, max_train_tokens=500, max_heldout_tokens=100, **common),
    }


def test_text_that_names_a_token_beyond_the_embedding_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    config = DataConfig(train=str(tmp_path / "a.txt"), sequence_length=LENGTH)
    store = Store(str(tmp_path / "store"))
    for text, name in (("some words here and more " * 90, "good"), ("some <image> words " * 90, "bad")):
        (tmp_path / "a.txt").write_text(text)
        artifact = store.artifact("tokens", {"which": name}, {})
        if name == "good":
            save_tokens(config, tokenizer, None, artifact, VOCAB_SIZE)
        else:
            with pytest.raises(
                DataError, match="the text has '<image>', and the parent's embedding of 257 rows none for that token"
            ):
                save_tokens(config, tokenizer, None, artifact, VOCAB_SIZE)
            assert not artifact.finished


CASES = ["held-out file", "few documents", "many documents", "limits", "a limit of few"]


def arrays(artifact):
    return [split.sequences[:] for split in load_tokens(artifact)]


@pytest.mark.parametrize("case", CASES)
def test_blocks_change_no_token_and_the_store_gives_them_back(texts, case, tmp_path, monkeypatch):
    config, tokenizer = configs(texts)[case], byte_tokenizer()
    train, heldout = tokenise(config, tokenizer, None)
    for size in (300, 2000, 16_000_000):
        monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", size)
        artifact = Store(str(tmp_path)).artifact("tokens", {"size": size}, {})
        save_tokens(config, tokenizer, None, artifact)
        found = arrays(artifact)
        assert np.array_equal(found[0], train.sequences) and np.array_equal(found[1], heldout.sequences)
        assert artifact.facts()["train_sha256"] == train.content_hash()
        number = len(artifact.names("train") + artifact.names("all"))
        assert number == 1 if size > 10**6 else number > (size == 300)
    rows = [json.loads(line)["text"] for line in Path(config.train).read_text().splitlines()]
    if case == "held-out file":
        assert np.array_equal(train.sequences, pack(rows, tokenizer, LENGTH, 10**9))
    if case == "few documents":
        assert np.array_equal(np.concatenate([train.sequences, heldout.sequences]), pack(rows, tokenizer, LENGTH, 10**9))
    if case == "many documents":
        route = blocks._by_hash(0.2)
        kinds = [route(Piece(text, begins=True)) for text in rows]
        assert 0.15 < kinds.count("heldout") / len(kinds) < 0.25
        for name, split in (("train", train), ("heldout", heldout)):
            own = [text for text, kind in zip(rows, kinds, strict=True) if kind == name]
            assert np.array_equal(split.sequences, pack(own, tokenizer, LENGTH, 10**9))
    if "limit" in case:
        assert train.num_tokens <= config.max_train_tokens and heldout.num_tokens <= config.max_heldout_tokens


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("written", [1, 4])
def test_an_interrupted_run_tokenises_nothing_again(texts, case, written, tmp_path, monkeypatch):
    config, tokenizer = configs(texts)[case], byte_tokenizer()
    monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", 100)
    whole, cut = (Store(str(tmp_path)).artifact("tokens", {"which": name}, {}) for name in ("whole", "cut"))
    seen = []
    inner = blocks.token_ids
    monkeypatch.setattr(blocks, "token_ids", lambda texts, t: (seen.extend(texts), inner(texts, t))[1])
    save_tokens(config, tokenizer, None, whole)
    expected = len(seen)
    seen.clear()
    write, left = token_shards.write_shard, [written]

    def stopping(*arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(*arguments)

    monkeypatch.setattr(token_shards, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        save_tokens(config, tokenizer, None, cut)
    before = len(seen)
    monkeypatch.setattr(token_shards, "write_shard", write)
    save_tokens(config, tokenizer, None, cut)
    assert expected <= len(seen) <= expected + 300 and 0 < before < len(seen), "at most the block that was not finished"
    for a, b in zip(arrays(whole), arrays(cut), strict=True):
        assert np.array_equal(a, b)
    assert whole.read_json(INDEX) == cut.read_json(INDEX)


def test_a_finished_set_of_blocks_is_only_read_past(texts, tmp_path, monkeypatch):
    """Killed after the last shard and before the record: nothing is tokenised, and what is counted is the same."""
    for case in CASES:
        config, tokenizer = configs(texts)[case], byte_tokenizer()
        artifact = Store(str(tmp_path)).artifact("tokens", {"case": case}, {})
        here = Here(token_shards.ArtifactShards(artifact, tokenizer), tokenizer)
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "BLOCK_CHARACTERS", 400)
            done = tokenise_into(here, config, None)
            patch.setattr(blocks, "token_ids", lambda texts, t: pytest.fail("tokenised again") if texts else [])
            assert tokenise_into(here, config, None) == done


def sharded(tmp_path, counts, rows=None):
    """Shards of so many tokens, and the sequences that they hold together."""
    artifact = Store(str(tmp_path)).artifact("tokens", {"counts": counts}, {})
    flat = np.random.default_rng(0).integers(0, 96, sum(counts), dtype=np.int32)
    for number, part in enumerate(np.split(flat, np.cumsum(counts)[:-1])):
        token_shards.write_shard(artifact, token_shards.shard_name("train", number), part, {})
    whole = flat[: len(flat) // LENGTH * LENGTH].reshape(-1, LENGTH)
    rows = rows or (0, len(whole))
    return TokenShards(artifact, "train", counts, LENGTH, rows), whole[slice(*rows)]


def test_shards_are_read_like_an_array_and_few_are_open(tmp_path):
    """Sequences begin in one shard and end in another, or lie over several short ones."""
    found, whole = sharded(tmp_path, [85, 0, 107, 50, 3, 1, 4, 149, 11, 90], (2, 29))
    assert len(found) == 27 and found.shape == whole.shape
    rows = np.random.default_rng(1).integers(0, 27, 40)
    assert np.array_equal(found[rows], whole[rows]) and np.array_equal(found[3:20], whole[3:20])
    assert np.array_equal(found[:], whole) and found[5:5].shape == (0, LENGTH)
    assert len(found._open) <= OPEN_SHARDS
    again = pickle.loads(pickle.dumps(found))
    assert not again._open and np.array_equal(again[rows], whole[rows])
    with pytest.raises(IndexError):
        found[np.array([27])]
    assert Tokens(found).content_hash() == Tokens(whole).content_hash()
    assert Tokens(found).content_hash(100) == Tokens(whole).content_hash(100)


def test_one_shard_is_read_in_the_order_of_an_array(tmp_path):
    found, whole = sharded(tmp_path, [64 * LENGTH])
    for number in (0, 3, 40):
        assert np.array_equal(Tokens(found).batch(7, number, 4), Tokens(whole).batch(7, number, 4))


def test_an_epoch_of_many_shards_reads_all_once_a_few_shards_at_a_time(tmp_path):
    found, whole = sharded(tmp_path, [8 * LENGTH] * 20)
    tokens, size = Tokens(found), 4
    epochs = []
    for epoch in range(2):
        batches = [tokens.batch(3, epoch * 40 + number, size).numpy() for number in range(40)]
        read = np.concatenate(batches)
        assert sorted(map(bytes, read.astype(np.int32))) == sorted(map(bytes, whole))
        epochs.append(read)
        place = {bytes(row): index // 8 for index, row in enumerate(whole)}
        for begin in range(0, 40, 6):  # a window of shards
            window = np.concatenate(batches[begin : begin + 6]).astype(np.int32)
            assert len({place[bytes(row)] for row in window}) <= 2 * (OPEN_SHARDS - 1)
    assert not np.array_equal(*epochs)
    assert np.array_equal(tokens.batch(3, 11, size), Tokens(found).batch(3, 11, size))
    validation, training = tokens.split_validation(3, 20)
    assert np.array_equal(validation.batch(3, 2, size), tokens.batch(3, 2, size))
    assert np.array_equal(training.batch(3, 2, size), tokens.batch(3, 7, size))


def write_earlier_shard(artifact, name, sequences, facts):
    """As earlier versions wrote them: whole sequences, and what was left over behind them."""
    flat = pa.array(sequences.ravel())
    column = pa.FixedSizeListArray.from_arrays(flat, sequences.shape[1])
    schema = pa.schema([("tokens", column.type)], metadata={b"puzzle_ray": json.dumps(facts)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([column], schema=schema))
    artifact.write(name, sink.getvalue().to_pybytes())


def test_shards_of_an_earlier_version_are_read(tmp_path):
    artifact = Store(str(tmp_path)).artifact("tokens", {}, {})
    whole = np.random.default_rng(0).integers(0, 96, (12, LENGTH), dtype=np.int32)
    counts = [5, 0, 4, 3]
    for number, part in enumerate(np.split(whole, np.cumsum(counts)[:-1])):
        write_earlier_shard(artifact, token_shards.shard_name("all", number), part, {"rest": [1], "total": 9, "characters": 9})
    splits = {"train": {"shards": "all", "counts": counts, "rows": [0, 9]}}
    splits["heldout"] = {"shards": "all", "counts": counts, "rows": [9, 12]}
    artifact.write_json(INDEX, {"length": LENGTH, "splits": splits})
    train, heldout = load_tokens(artifact)
    assert np.array_equal(train.sequences[:], whole[:9]) and np.array_equal(heldout.sequences[:], whole[9:])
    assert train.window == 5 * (OPEN_SHARDS - 1)


def test_what_an_earlier_version_left_unfinished_is_done_again(texts, tmp_path):
    config, tokenizer = configs(texts)["few documents"], byte_tokenizer()
    artifact = Store(str(tmp_path)).artifact("tokens", {}, {})
    rows = np.zeros((9, LENGTH), dtype=np.int32)
    write_earlier_shard(artifact, token_shards.shard_name("all", 0), rows, {"rest": [], "total": 144, "characters": 2000})
    artifact.write_json(INDEX, {"length": LENGTH, "splits": {}})
    save_tokens(config, tokenizer, None, artifact)
    for found, expected in zip(arrays(artifact), tokenise(config, tokenizer, None), strict=True):
        assert np.array_equal(found, expected.sequences)


def test_tokens_of_an_earlier_version_are_read(tmp_path):
    import torch

    artifact = Store(str(tmp_path)).artifact("tokens", {}, {})
    train = torch.arange(64, dtype=torch.int32).view(4, 16)
    artifact.write_tensors(TOKENS, {"train": train, "heldout": train[:1].clone()})
    assert np.array_equal(load_tokens(artifact)[0].sequences, train.numpy())


def test_a_damaged_shard_is_found(texts, tmp_path):
    artifact = Store(str(tmp_path)).artifact("tokens", {}, {})
    save_tokens(configs(texts)["held-out file"], byte_tokenizer(), None, artifact)
    name = token_shards.shard_name("train", 0)
    path = tmp_path / artifact.name / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(bytes(data))
    again = Store(str(tmp_path)).artifact("tokens", {}, {})
    with pytest.raises(Damaged):
        load_tokens(again)[0].sequences[:]
