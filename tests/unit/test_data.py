"""Text to batches: nothing lost, nothing invented, and an order that depends on (seed, number) alone."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from puzzle_ray.data.documents import TextFacts, documents
from puzzle_ray.data.order import Tokens
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.data.sources import check_source, source_fingerprint
from puzzle_ray.data.tokenising import pack, tokenise
from puzzle_ray.errors import DataError


@pytest.fixture(scope="module")
def tokenizer():
    """One token per character of a small alphabet."""
    vocab = {"<s>": 0, **{c: i + 1 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz ")}}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<s>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", unk_token="<s>")


def test_packing_joins_documents_with_the_separator(tokenizer):
    packed = pack(iter(["abc", "de"]), tokenizer, 3, 100)
    assert packed.tolist() == [[0, 1, 2], [3, 0, 4]]  # <s>abc<s>de, the rest (e) is dropped


def test_packing_stops_at_the_token_limit(tokenizer):
    assert pack(iter(["a" * 50] * 50), tokenizer, 10, 40).size == 40


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "folder", "glob"])
def test_every_kind_of_source_gives_the_same_documents(tmp_path, kind):
    texts = ["one", "two", "three"]
    if kind == "jsonl":
        source = tmp_path / "x.jsonl"
        source.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    elif kind == "parquet":
        source = tmp_path / "x.parquet"
        pq.write_table(pa.table({"text": texts}), source)
    else:
        for n, text in enumerate(texts):
            (tmp_path / f"{n}.txt").write_text(text)
        source = {"txt": tmp_path, "folder": tmp_path, "glob": tmp_path / "*.txt"}[kind]
    assert list(documents(str(source), DataConfig(), "data.train")) == texts


def test_batches_are_a_function_of_seed_and_number_and_every_epoch_sees_all():
    tokens = Tokens(np.arange(40, dtype=np.int32).reshape(10, 4))
    assert torch.equal(tokens.batch(1, 3, 2), tokens.batch(1, 3, 2)) and not torch.equal(
        tokens.batch(1, 3, 2), tokens.batch(2, 3, 2)
    )
    epoch = torch.cat([tokens.batch(0, n, 2) for n in range(5)])
    assert sorted(epoch[:, 0].tolist()) == list(range(0, 40, 4))
    assert not torch.equal(epoch, torch.cat([tokens.batch(0, n, 2) for n in range(5, 10)]))


def test_evaluation_batches_are_the_first_sequences_in_order():
    tokens = Tokens(np.arange(40, dtype=np.int32).reshape(10, 4))
    batches = tokens.first(20, 2)
    assert [len(b) for b in batches] == [2, 2, 1] and torch.cat(batches)[:, 0].tolist() == [0, 4, 8, 12, 16]


def test_heldout_documents_are_not_trained_on(tmp_path, tokenizer):
    source = tmp_path / "x.jsonl"
    letters = "abcdefghijklmnopqrstuvwxy"
    texts = [letters[i % 25] + letters[i // 25 % 25] + letters[i // 625] + "z" * 13 for i in range(1200)]
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    train, heldout = tokenise(DataConfig(train=str(source), sequence_length=17, heldout_fraction=0.2), tokenizer, None)
    seen = {tuple(row[1:4]) for row in train.sequences.tolist()}
    held = {tuple(row[1:4]) for row in heldout.sequences.tolist()}
    assert held and seen and not seen & held and len(seen) + len(held) == 1200


def test_few_documents_are_split_by_sequences_so_that_both_parts_have_some(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("abcdefghij" * 40)
    train, heldout = tokenise(DataConfig(train=str(tmp_path / "a.txt"), sequence_length=10), tokenizer, None)
    assert len(heldout.sequences) == 2 and len(train.sequences) == 38


def test_many_documents_that_are_all_the_same_are_split_by_sequences(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": "abcdefghi"}) + "\n") * 1200)
    facts: dict[str, TextFacts] = {}
    config = DataConfig(train=str(tmp_path / "a.jsonl"), sequence_length=10)
    train, heldout = tokenise(config, tokenizer, None, facts)
    assert (len(train.sequences), len(heldout.sequences)) == (1140, 60)
    assert facts["train"].line() == "1200 documents", "read again, counted once"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: str(p / "absent.txt"), "no .txt, .jsonl or .parquet file"),
        (lambda p: (p / "e.txt").write_text("") and "" or str(p / "e.txt"), "is empty"),
        (lambda p: (p / "a.csv").write_text("x") and str(p), "no .txt, .jsonl or .parquet file"),
    ],
)
def test_sources_that_cannot_work_are_refused_early(tmp_path, make, words):
    with pytest.raises(DataError, match=words):
        check_source(make(tmp_path), "data.train")


def test_mixed_formats_wrong_column_too_short_and_too_long(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match="mixes json, text files"):
        check_source(str(tmp_path), "data.train")
    with pytest.raises(DataError, match="no column 'text'; data.text_column is one of .'body'."):
        list(documents(str(tmp_path / "b.jsonl"), DataConfig(), "data.train"))
    with pytest.raises(DataError, match="not even one sequence of 256 tokens"):
        tokenise(DataConfig(train=str(tmp_path / "a.txt"), heldout=str(tmp_path / "a.txt")), tokenizer, None)
    with pytest.raises(DataError, match="256 is longer than the parent's 128 positions"):
        tokenise(DataConfig(train=str(tmp_path / "a.txt")), tokenizer, 128)


def test_fingerprint_follows_content(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = source_fingerprint(str(file))
    file.write_text("two")
    assert source_fingerprint(str(file)) != before
