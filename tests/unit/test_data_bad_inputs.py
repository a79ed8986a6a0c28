"""Texts that cannot be used: each is refused in one line that names it and says what is wrong, and nothing is left behind."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from byte_tokenizer import byte_tokenizer

from puzzle_ray.data import documents as documents_module
from puzzle_ray.data.documents import check_text
from puzzle_ray.data.files import find_files
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.data.sources import check_source, source_fingerprint
from puzzle_ray.data.tokenising import tokenise
from puzzle_ray.errors import DataError


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(columns):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


GOOD = lines({"text": "a" * 100})
CHAT = [{"role": "user", "content": "hi"}]
NOT_UTF8 = pa.array([b"caf\xe9"], type=pa.binary()).view(pa.string())

# name, bytes, settings, words of the error
BAD = [
    ("utf16.txt", "text".encode("utf-16") * 9, {}, r"looks like UTF-16 \(18 of the 90 bytes are no UTF-8, 36 are zero\)"),
    ("utf16_without_mark.txt", ("text" * 9).encode("utf-16-le"), {}, r"looks like UTF-16 \(0 of the 72 bytes are no UTF-8"),
    ("latin1.txt", "caf\xe9 ".encode("latin-1") * 3, {}, r"is not UTF-8 \(3 of the 15 bytes are no UTF-8\); save it as UTF-8"),
    ("random.txt", b"\xff\xfb\x90d" * 50, {}, r"is not UTF-8 \(150 of the 200 bytes"),
    ("cut_character.txt", "é".encode()[:1], {}, r"is not UTF-8 \(1 of the 1 bytes"),
    ("latin1.jsonl", b'{"text": "caf\xe9"}\n', {}, r"latin1.jsonl' is not UTF-8 \(1 of the 17 bytes"),
    ("latin1.txt.gz", gzip.compress(b"caf\xe9"), {}, r"latin1.txt.gz' is not UTF-8 \(1 of the 4 bytes"),
    ("latin1.parquet", parquet({"text": NOT_UTF8}), {}, "latin1.parquet', row 1: 1 of 4 bytes are no UTF-8"),
    ("surrogate.jsonl", GOOD + b'{"text": "\\ud83d"}\n', {}, "surrogate.jsonl', line 2: 'text' has half of a surrogate pair"),
    ("broken.jsonl", GOOD + b'\n{"text": "a",}\n', {}, "broken.jsonl', line 3: no valid JSON"),
    ("cut.jsonl", GOOD + b'{"text": "a', {}, "cut.jsonl', line 2: no valid JSON .Unterminated string"),
    ("deep.jsonl", b'{"text": ' + b"[" * 100_000, {}, "deep.jsonl', line 1: no valid JSON"),
    ("no_comma.json", b'[{"text": "a"}\n{"text": "b"}]', {}, "no_comma.json', line 2: no valid JSON .expecting ',' or '\\]'"),
    ("no_end.json", b'[{"text": "a"},\n\n{"text": "b"}\n', {}, "no_end.json', line 4: no valid JSON .the array has no end"),
    ("broken.json", b'[{"text": "a"},\n{"text" "b"}]', {}, "broken.json', line 2: no valid JSON"),
    ("comma.json", b'[{"text": "a"},]', {}, "comma.json', line 1: no valid JSON"),
    ("more.json", b'[{"text": "a"}]\n[{"text": "b"}]', {}, "more.json', line 2: no valid JSON .something follows the array"),
    ("lists.jsonl", b'["a"]\n', {}, "lists.jsonl', line 1 is list of string, not an object"),
    ("numbers.jsonl", lines({"text": 1.5}), {}, "line 1: column 'text' holds number, not text; set data.text_column"),
    ("booleans.jsonl", lines({"text": True}), {}, "column 'text' holds boolean, not text"),
    ("sentences.jsonl", lines({"text": ["a", "b"]}), {}, "column 'text' holds list of string, not text"),
    ("object.jsonl", lines({"text": {"en": "a"}}), {}, "column 'text' holds object with 'en', not text"),
    (
        "turns.jsonl",
        lines({"text": [{"from": "human", "value": "a"}]}),
        {},
        "holds list of object with 'from', 'value', not text",
    ),
    ("later.jsonl", GOOD * 5 + lines({"text": 7}), {}, "later.jsonl', line 6: column 'text' holds integer, not text"),
    ("chat.jsonl", lines({"text": CHAT}), {}, "holds chat messages, and the tokenizer '.*' has no chat template"),
    ("binary.parquet", parquet({"text": [b"a"]}), {}, "binary.parquet', row 1: column 'text' holds binary, not text"),
    ("dates.parquet", parquet({"text": pa.array([1], pa.date32())}), {}, "column 'text' holds date, not text"),
    (
        "column.jsonl",
        lines({"body": "a", "data": {"id": 1}}),
        {},
        r"no column 'text'; data.text_column is one of \['body', 'data.id'\]",
    ),
    ("column.parquet", parquet({"body": ["a"]}), {}, r"no column 'text'; data.text_column is one of \['body'\]"),
    ("nested.jsonl", lines({"data": {"text": "a"}}), {"text_column": "data.body"}, r"no column 'data.body'; .*\['data.text'\]"),
    ("no.parquet", b"PAR1 and no more", {}, "no.parquet' cannot be read"),
    ("cut.parquet", parquet({"text": ["a"] * 99})[:-20], {}, "cut.parquet' cannot be read"),
    ("no.txt.gz", b"plain", {}, "no.txt.gz' cannot be read .Not a gzipped file"),
    ("cut.jsonl.gz", gzip.compress(GOOD)[:-12], {}, "cut.jsonl.gz' cannot be read .Compressed file ended"),
    ("no.txt.zst", b"plain", {}, "no.txt.zst' cannot be read"),
    ("no.txt.xz", b"plain", {}, "no.txt.xz' cannot be read"),
    ("no.txt.bz2", b"plain", {}, "no.txt.bz2' cannot be read"),
    (
        "table.csv",
        b"text\na\n",
        {},
        "no .txt, .jsonl or .parquet file at .*; write tables of other kinds, such as .csv, as .jsonl",
    ),
    ("x.parquet.gz", b"", {}, "no .txt, .jsonl or .parquet file at"),
    ("empty.txt", b"", {}, "is empty"),
    ("blank.jsonl", b"\n\n", {}, "not even one sequence of 8 tokens"),
    ("nothing.jsonl", lines({"text": None}, {"text": ""}), {}, "nothing in column 'text', all 2 rows without text dropped"),
    ("null.parquet", parquet({"text": pa.array([None] * 9, pa.string())}), {}, "column 'text', all 9 rows without text dropped"),
    ("short.txt", b"abc", {}, "not even one sequence of 8 tokens"),
]


def all_of(source, tokenizer, **settings):
    """All that a run does with a source."""
    config = DataConfig(train=source, sequence_length=8, **settings)
    check_source(source, "data.train")
    source_fingerprint(source)
    check_text(config, tokenizer)
    tokenise(config, tokenizer, None)


@pytest.mark.parametrize(("name", "content", "settings", "words"), BAD, ids=[row[0] for row in BAD])
def test_bad_texts_are_refused_in_one_line(tmp_path, name, content, settings, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        all_of(str(path), byte_tokenizer(), **settings)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700 and error.value.__cause__ is None
    assert [file.name for file in tmp_path.iterdir()] == [name] and path.read_bytes() == content


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "'' names nothing"),
        ("{folder}/absent.txt", "no .txt, .jsonl or .parquet file"),
        ("{folder}/absent/*.txt", "no .txt, .jsonl or .parquet file"),
        ("{folder}/only_about", "holds no text but 'README.md'; name that file itself"),
        ("{folder}/mixed", "mixes json, text files; name a glob of one kind"),
        ("{folder}/kept", "holds .arrow files, as the datasets library keeps them for itself; .* to_parquet"),
        ("~nobody-of-this-name/x.txt", "cannot be read|no .txt, .jsonl or .parquet file"),
        ("{folder}/zero\0.txt", "cannot be read|no .txt, .jsonl or .parquet file"),
        ("nothing://x/y.txt", "'nothing://x/y.txt' cannot be opened .Protocol not known"),
        ("http://127.0.0.1:9/x.txt", "'http://127.0.0.1:9/x.txt' cannot be read .Cannot connect"),
        ("http://127.0.0.1:9/folder/", "'http://127.0.0.1:9/folder/' cannot be read .Cannot connect"),
        ("http://127.0.0.1:9/page", "no .txt, .jsonl or .parquet file"),
        ("memory://nowhere/x.txt", "no .txt, .jsonl or .parquet file"),
    ],
)
def test_bad_names_are_refused_in_one_line(tmp_path, source, words):
    kept = ["dataset_info.json", "state.json", "data-00000-of-00001.arrow"]
    for folder, names in (("only_about", ["README.md"]), ("mixed", ["a.txt", "b.jsonl"]), ("kept", kept)):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text("x")
    with pytest.raises(DataError, match=words) as error:
        all_of(source.format(folder=tmp_path), byte_tokenizer())
    assert "\n" not in str(error.value)


def test_tables_of_a_cache_beside_text_are_left_out(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "cache-1.arrow").write_bytes(b"")
    assert [Path(file.path).name for file in find_files(str(tmp_path)).files] == ["text.jsonl"]


def test_a_file_that_may_not_be_read(tmp_path):
    """As root everything may be read: a folder in the file's place stands for it."""
    from puzzle_ray.data.files import TextFile
    from puzzle_ray.data.formats import text_chunks

    with pytest.raises(DataError, match="cannot be read .*Is a directory"):
        list(text_chunks(TextFile(f"{tmp_path}", f"{tmp_path}"), "data.train"))


def test_a_chat_template_that_refuses(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    (tmp_path / "a.jsonl").write_bytes(lines({"text": CHAT}))
    with pytest.raises(DataError, match="line 1: the tokenizer's chat template refuses column 'text' .roles must alternate"):
        all_of(str(tmp_path / "a.jsonl"), tokenizer)


class Refusing:
    bos_token = eos_token = None
    bos_token_id = eos_token_id = None

    def __call__(self, texts, **settings):
        raise RuntimeError("no token\nfor this")


def test_a_tokenizer_that_fails(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text")
    with pytest.raises(DataError, match="the parent's tokenizer cannot read the text .no token.;"):
        all_of(str(tmp_path / "a.txt"), Refusing())


@pytest.mark.parametrize("error", [OSError("gone\nand more"), KeyError("x"), RuntimeError("generator raised StopIteration")])
def test_whatever_reading_a_data_set_of_the_hub_raises(monkeypatch, error):
    import datasets

    def load_dataset(*args, **kwargs):
        yield {"text": "one"}
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(documents_module, "hub_commit", lambda source, where: "c0ffee")
    with pytest.raises(DataError, match="'some/texts' cannot be read") as raised:
        check_text(DataConfig(train="some/texts"), byte_tokenizer())
    assert "\n" not in str(raised.value)
