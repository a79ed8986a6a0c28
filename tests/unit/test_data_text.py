"""Text is text: every format and compression is read right, rows without text are counted, long documents come in pieces."""

import bz2
import gzip
import json
import lzma
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from byte_tokenizer import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from puzzle_ray.data import documents as documents_module
from puzzle_ray.data import formats
from puzzle_ray.data.columns import MISSING, find
from puzzle_ray.data.documents import TextFacts, check_text, cut, documents, pieces
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.data.tokenising import pack, tokenise
from puzzle_ray.errors import DataError

TEXTS = ["one\ntwo", "ünïcödé \u2028 line", "", 'quo"te', "last"]
WORDS = "the quick brown fox, jumps over 13 lazy dogs.\n\nAnd again: it's déjà vu! "


def read(source, tokenizer=None, **settings):
    facts = TextFacts()
    return list(documents(str(source), DataConfig(**settings), "data.train", tokenizer, facts)), facts


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def bpe():
    """Byte-level BPE, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [WORDS], trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def compressed_zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": compressed_zstd}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_compressed_files_give_the_same_text(tmp_path, suffix):
    compress = COMPRESSIONS[suffix]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()
    (tmp_path / f"rows.jsonl{suffix}").write_bytes(compress(lines))
    (tmp_path / f"text.txt{suffix}").write_bytes(compress("ünï\r\ncode".encode()))
    texts, facts = read(tmp_path / f"rows.jsonl{suffix}")
    assert texts == [text for text in TEXTS if text] and facts.dropped_rows == 1
    assert read(tmp_path / f"text.txt{suffix}")[0] == ["ünï\ncode"]


def test_compressed_files_of_several_parts_are_read_to_the_end(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    assert read(tmp_path / "a.txt.gz")[0] == ["one two"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    assert read(tmp_path / "a.txt")[0] == read(tmp_path / "b.jsonl")[0] == ["one"]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
def test_characters_and_line_ends_across_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr(formats, "_BLOCK_BYTES", block)
    (tmp_path / "a.txt").write_bytes("aé€😀\r\nb\rc\n".encode())
    assert read(tmp_path / "a.txt")[0] == ["aé€😀\nb\nc\n"]
    rows = [{"text": f"aé€😀 {n}", "more": [1, {"x": "}]"}]} for n in range(5)]
    for text in (
        "\n\n".join(map(json.dumps, rows)),
        json.dumps(rows),
        json.dumps(rows, indent=2, ensure_ascii=False),
        "[]",
        " \n",
    ):
        (tmp_path / "a.json").write_text(text)
        assert read(tmp_path / "a.json")[0] == ([row["text"] for row in rows] if "text" in text else [])


@given(st.binary(max_size=60), st.integers(1, 7))
def test_bytes_that_are_no_utf8_are_counted_alike_in_blocks_of_any_size(data, size):
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    counted = sum(formats.undecodable_bytes(data[i : i + size], decoder) for i in range(0, len(data), size))
    try:
        data.decode()
        assert counted == 0
    except UnicodeDecodeError:
        assert counted + len(decoder.getstate()[0]) == formats.undecodable_bytes(data)


def test_rows_of_other_columns_and_types_later_on(tmp_path):
    rows = [{"text": "a", "n": 1}] * 2000 + [{"text": "b", "n": "x", "link": {"deep": [1]}}, {"text": "c"}]
    assert read(jsonl(tmp_path / "a.jsonl", rows))[0] == ["a"] * 2000 + ["b", "c"]
    folder = tmp_path / "parquet"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), folder / "0.parquet")
    pq.write_table(pa.table({"n": ["x"], "text": pa.array(["b"]).dictionary_encode()}), folder / "1.parquet")
    pq.write_table(pa.table({"body": ["y", "z"]}), folder / "2.parquet")
    texts, facts = read(folder)
    assert texts == ["a", "b"] and facts.line() == "2 documents, 2 rows without text dropped"


def test_rows_without_text_are_counted(tmp_path):
    rows = [{"text": "a"}, {"content": "b"}, {"text": None}, {"text": ""}, {"text": "c"}]
    texts, facts = read(jsonl(tmp_path / "a.jsonl", rows))
    assert texts == ["a", "c"] and facts.line() == "2 documents, 3 rows without text dropped"
    told: dict[str, TextFacts] = {}
    jsonl(tmp_path / "b.jsonl", [{"text": "abcdefghij" * 9}, {"content": "b"}] * 3)
    tokenise(DataConfig(train=str(tmp_path / "b.jsonl"), sequence_length=8), byte_tokenizer(), None, told)
    assert told["train"].line() == "3 documents, 3 rows without text dropped"


def test_a_column_without_any_text_is_refused_by_the_check(tmp_path):
    empty = jsonl(tmp_path / "a.jsonl", [{"text": None}] * 9)
    with pytest.raises(DataError, match="all 9 rows without text dropped"):
        check_text(DataConfig(train=str(empty)), byte_tokenizer())
    late = jsonl(tmp_path / "b.jsonl", [{"text": None}] * 1200 + [{"text": "abcdefghij" * 9}])
    check_text(DataConfig(train=str(late)), byte_tokenizer())  # what stands further behind is not looked at yet
    assert len(read(late)[0]) == 1


def test_nested_columns_and_names_with_dots(tmp_path):
    rows = [{"data": {"text": "nested", "x": 1}}, {"data.text": "named"}]
    assert read(jsonl(tmp_path / "a.jsonl", rows), text_column="data.text")[0] == ["nested", "named"]
    pq.write_table(pa.table({"data": [{"text": "nested", "x": 1}]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"data.text": ["named"], "data": [1]}), tmp_path / "b.parquet")
    assert read(tmp_path / "*.parquet", text_column="data.text")[0] == ["nested", "named"]
    assert find({"a.b": {"c": 1}}, "a.b.c") == find({"a": {"b.c": 1}}, "a.b.c") == 1
    assert find({"a": {"b": 1}}, "a.c") is MISSING and find({"a": 1}, "a.b") is MISSING


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def test_chat_messages_are_written_out_by_the_chat_template(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": []}])
    pq.write_table(pa.table({"messages": [CHAT]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):  # packing writes the mark of beginning
        assert read(tmp_path / name, tokenizer, text_column="messages")[0] == ["user: hi\nassistant: ho\n"]
    check_text(DataConfig(train=str(tmp_path / "a.jsonl"), text_column="messages"), tokenizer)


def test_a_call_of_a_tool_may_have_no_content(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}{{ 'CALL' if m.tool_calls }}")
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    for call in ({"role": "assistant", "tool_calls": calls}, {"role": "assistant", "content": None, "tool_calls": calls}):
        path = jsonl(tmp_path / "a.jsonl", [{"text": [CHAT[0], call, {"role": "tool", "content": "2"}]}])
        assert read(path, tokenizer)[0] == ["user: hi\nassistant: CALL\ntool: 2\n"]
    pq.write_table(pa.table({"text": [[CHAT[0], call]]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", tokenizer)[0] == ["user: hi\nassistant: CALL\n"]
    odd = jsonl(tmp_path / "b.jsonl", [{"text": [CHAT[0], {"role": "assistant", "value": "ho"}]}])
    with pytest.raises(DataError, match="holds list of object with 'role', 'value', not text"):
        read(odd, tokenizer)


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("{{ m.content }}", "{{ m.content if m.content is string }}")])
def test_parts_of_a_message_are_read_as_its_text_whatever_the_template_makes_of_a_list(tmp_path, template):
    """Else one template writes the list out as code into the text, and another one writes nothing."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    path = jsonl(tmp_path / "a.jsonl", [{"text": [{"role": "user", "content": parts}, {"role": "assistant", "content": ["ho"]}]}])
    assert read(path, tokenizer)[0] == ["user: hi\nassistant: ho\n"]
    pq.write_table(
        pa.table({"text": [[{"role": "user", "content": [p | {"image": None} for p in parts]}]]}), tmp_path / "a.parquet"
    )
    assert read(tmp_path / "a.parquet", tokenizer)[0] == ["user: hi\n"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "x"}], "has a part of type 'image_url' for content"),
        (
            {"type": "text", "text": "a"},
            "has a part of type 'text' for content, not text; write content as a string, or as parts",
        ),
        (5, "a message in column 'text' has integer for content, not text"),
        ([{"type": "text", "text": None}], "has a part of type 'text' for content"),
        ("a\ud83d", "line 1: 'text' has half of a surrogate pair"),
    ],
)
def test_a_message_whose_content_is_no_text_is_refused(tmp_path, content, words):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(DataError, match=words):
        read(jsonl(tmp_path / "a.jsonl", [{"text": [{"role": "user", "content": content}]}]), tokenizer)


def test_the_check_looks_at_the_first_rows_of_both_sources(tmp_path):
    good = jsonl(tmp_path / "good.jsonl", [{"text": "a"}])
    late = jsonl(tmp_path / "late.jsonl", [{"text": "a"}] * 150 + [{"text": 1}])
    bad = jsonl(tmp_path / "bad.jsonl", [{"text": 1.5}])
    check_text(DataConfig(train=str(good), heldout=str(late)), byte_tokenizer())
    with pytest.raises(DataError, match=r"data.heldout: .*bad.jsonl', line 1: column 'text' holds number, not text"):
        check_text(DataConfig(train=str(good), heldout=str(bad)), byte_tokenizer())
    endless = jsonl(tmp_path / "endless.jsonl", [{"body": "a"}] * 1500)
    with pytest.raises(DataError, match="no column 'text' in its first 1000 rows; data.text_column is one of .'body'."):
        check_text(DataConfig(train=str(endless)), byte_tokenizer())


@given(st.lists(st.text(alphabet="ab \n.é", max_size=60), max_size=8))
def test_pieces_join_to_the_document(chunks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "WHOLE_CHARACTERS", 50)
        patch.setattr(documents_module, "PIECE_CHARACTERS", 20)
        found = list(cut(chunks))
    assert "".join(piece.text for piece in found) == "".join(chunks)
    assert [piece.begins for piece in found] == [True] + [False] * (len(found) - 1)
    assert len(found) == 1 if sum(map(len, chunks)) <= 50 else all(len(piece.text) <= 40 for piece in found)


def test_the_tokens_of_a_long_document_are_those_of_the_whole(bpe, monkeypatch):
    text = WORDS * 200
    whole = pack([text], bpe, 16, 10**6)
    monkeypatch.setattr(documents_module, "WHOLE_CHARACTERS", 1000)
    monkeypatch.setattr(documents_module, "PIECE_CHARACTERS", 100)
    assert len(list(cut([text]))) > 50
    assert pack([text], bpe, 16, 10**6).tolist() == whole.tolist()


def test_a_limit_on_tokens_limits_what_is_read_of_a_long_document(tmp_path):
    (tmp_path / "long.txt").write_text(WORDS * 200_000)  # about 15 MB
    config = DataConfig(train=str(tmp_path / "long.txt"), max_train_tokens=20_000, max_heldout_tokens=2_000)
    tokenizer = byte_tokenizer()
    tracemalloc.start()
    train, heldout = tokenise(config, tokenizer, None)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert train.num_tokens + heldout.num_tokens <= 22_000 and train.num_sequences == 20_000 // 256
    assert peak_bytes < 14e6
    read_characters = sum(len(piece.text) for piece in pieces(config.train or "", config, "data.train"))
    assert read_characters == len(WORDS * 200_000)
