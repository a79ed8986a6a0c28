"""Mixtures of sources: shares follow the weights, the order follows from text and weights, and the record says what was taken of each."""

import json

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer

from puzzle_ray.config import load
from puzzle_ray.data import blocks
from puzzle_ray.data import documents as documents_module
from puzzle_ray.data.documents import check_text
from puzzle_ray.data.mixture import SourceRead, mixed
from puzzle_ray.data.settings import DataConfig, TextSource
from puzzle_ray.data.sources import likely_characters, source_inputs
from puzzle_ray.data.splits import load_tokens, save_tokens, tokens_summary
from puzzle_ray.data.tokenising import pack, tokenise
from puzzle_ray.errors import ConfigError, DataError
from puzzle_ray.store import Store

LENGTH = 16


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """{name: (file, its documents)} of a long and a short source, every document different."""
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    found = {}
    for name, count in (("a", 800), ("b", 300), ("c", 200)):
        rows = [f"{name}{i} " + "".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(5, 90))) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        found[name] = (str(folder / f"{name}.jsonl"), rows)
    return found


def weighted(texts, **weights):
    return [{"source": texts[name][0], "weight": weight} for name, weight in weights.items()]


def read(config):
    """(the pieces in order, what was read of every source)."""
    state = [SourceRead() for _ in config.sources("train")]
    return list(mixed(config, "train", None, state)), state


def test_every_document_is_of_the_source_that_is_furthest_behind(texts):
    config = DataConfig(train=weighted(texts, a=3, b=1, c=0.5))
    found, _ = read(config)
    weights, taken = [3, 1, 0.5], [0, 0, 0]
    left = {n: len(texts[name][1]) for n, name in enumerate("abc")}
    for piece in found:
        there = [n for n in left if left[n]]
        assert taken[piece.source] / weights[piece.source] == min(taken[n] / weights[n] for n in there)
        taken[piece.source] += len(piece.text)
        left[piece.source] -= 1
    assert not any(left.values())
    at_once = found[:300]  # none is at its end yet
    shares = [sum(len(piece.text) for piece in at_once if piece.source == n) for n in range(3)]
    assert np.allclose(np.array(shares) / sum(shares), np.array(weights) / sum(weights), atol=0.02)
    assert read(config)[0] == found
    doubled = DataConfig(train=weighted(texts, a=6, b=2, c=1))
    assert read(doubled)[0] == found, "weights are beside each other"


def test_long_documents_stay_whole(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "WHOLE_CHARACTERS", 500)
    monkeypatch.setattr(documents_module, "PIECE_CHARACTERS", 100)
    (tmp_path / "long.txt").write_text("some words " * 900)
    found, _ = read(DataConfig(train=[{"source": str(tmp_path / "long.txt")}, *weighted(texts, a=1)]))
    own = [n for n, piece in enumerate(found) if piece.source == 0]
    assert len(own) > 50 and own == list(range(own[0], own[-1] + 1))


@pytest.mark.parametrize("end", ["go_on", "stop", "repeat"])
def test_a_source_that_runs_out(texts, end):
    config = DataConfig(train=weighted(texts, a=1, b=1), source_end=end)
    found, state = read(config)
    of = [[piece.text for piece in found if piece.source == n] for n in range(2)]
    a, b = texts["a"][1], texts["b"][1]
    if end == "go_on":
        assert of == [a, b] and [s.times for s in state] == [1, 1]
    elif end == "stop":
        assert of[1] == b and len(b) < len(of[0]) < len(a) and of[0] == a[: len(of[0])]
        assert [s.times for s in state] == [0, 1] and abs(state[0].characters - state[1].characters) < 100
    else:
        assert of[0] == a and of[1] == (b * 9)[: len(of[1])] and len(of[1]) > 2 * len(b)
        assert [s.times for s in state] == [1, len(of[1]) // len(b)]


def saved(config, tmp_path, which, size, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", size)
    artifact = Store(str(tmp_path)).artifact("tokens", {"which": which}, {})
    save_tokens(config, byte_tokenizer(), None, artifact)
    return artifact


@pytest.mark.parametrize("limit", [10**6, 9000])
def test_the_record_counts_documents_tokens_and_drops_of_every_source(texts, tmp_path, monkeypatch, limit):
    with_drops = tmp_path / "c.jsonl"
    rows = [json.dumps({"text": text}) for text in texts["c"][1]]
    with_drops.write_text("\n".join(['{"text": ""}', '{"no": 1}', *rows]) + "\n")
    train = [*weighted(texts, a=2, b=1), {"source": str(with_drops), "weight": 1}]
    limits = {"max_train_tokens": limit, "max_heldout_tokens": limit // 5}
    config = DataConfig(train=train, heldout_fraction=0.2, sequence_length=LENGTH, **limits)
    whole = saved(config, tmp_path, f"whole {limit}", 10**7, monkeypatch)
    facts = whole.facts()
    sources = facts["sources"]
    assert [s["where"] for s in sources] == ["data.train[0]", "data.train[1]", "data.train[2]"]
    assert [s["weight"] for s in sources] == [2, 1, 1] and [s["dropped_rows"] for s in sources] == [0, 0, 2]
    assert sum(s["share"] for s in sources) == pytest.approx(1)
    for name in ("train", "heldout"):
        tokens = sum(s["tokens"][name] for s in sources)
        assert facts[f"{name}_tokens"] == tokens // LENGTH * LENGTH
    if limit == 10**6:
        assert [s["documents"] for s in sources] == [800, 300, 200]
        characters = sum(map(len, texts["a"][1]))
        assert sum(sources[0]["tokens"].values()) == characters + 800, "a byte is a token, and each document has a separator"
    else:
        assert facts["train_tokens"] == limit // LENGTH * LENGTH and facts["heldout_tokens"] == limit // 5 // LENGTH * LENGTH
        assert np.allclose([s["share"] for s in sources], [0.5, 0.25, 0.25], atol=0.03)
    assert "train[2]: '" in tokens_summary(facts) and "2 rows without text dropped" in tokens_summary(facts)
    for size in (700, 5000):
        cut = saved(config, tmp_path, f"{size} {limit}", size, monkeypatch)
        assert cut.facts()["train_sha256"] == facts["train_sha256"]
        assert np.array_equal(load_tokens(cut)[1].sequences[:], load_tokens(whole)[1].sequences[:])
        known = ("documents", "tokens", "share", "times_read", "dropped_rows") if limit == 10**6 else ("documents", "tokens")
        assert [[s[k] for k in known] for s in cut.facts()["sources"]] == [[s[k] for k in known] for s in sources]


def test_a_source_that_nothing_is_trained_on_is_seen_as_such(texts, tmp_path, monkeypatch):
    """Its one document is longer than the limit, and the others' are only held out: their shares of all tokens told of a mixture."""
    (tmp_path / "long.txt").write_text("one long document " * 20_000)
    rows = [json.dumps({"text": f"number {n}"}) for n in range(2000)]
    (tmp_path / "many.jsonl").write_text("\n".join(rows))
    train = [{"source": str(tmp_path / "long.txt"), "weight": 3}, {"source": str(tmp_path / "many.jsonl"), "weight": 1}]
    config = DataConfig(train=train, heldout_fraction=0.2, sequence_length=LENGTH, max_train_tokens=5000)
    said = tokens_summary(saved(config, tmp_path, "one", 10**7, monkeypatch).facts())
    assert "1 document, 5000 tokens to train on (100.0%), 0 tokens held out (0.0%), its end reached" in said
    assert "documents, 0 tokens to train on (0.0%), " in said and "tokens held out (100.0%), its end reached" in said


def test_a_mixture_packs_the_documents_in_its_order(texts):
    tokenizer = byte_tokenizer()
    config = DataConfig(train=weighted(texts, a=1, b=3), heldout=texts["c"][0], sequence_length=LENGTH)
    train, heldout = tokenise(config, tokenizer, None)
    assert np.array_equal(train.sequences, pack([p.text for p in read(config)[0]], tokenizer, LENGTH, 10**9))
    assert np.array_equal(heldout.sequences, pack(texts["c"][1], tokenizer, LENGTH, 10**9))


def test_one_source_is_the_same_however_it_is_written(texts):
    name = texts["a"][0]
    plain = DataConfig(train=name)
    for train in ({"source": name}, [name], [{"source": name, "weight": 7}], (TextSource(source=name),)):
        other = DataConfig(train=train)
        assert other.identity() == plain.identity() and source_inputs(other) == source_inputs(plain)
    assert set(source_inputs(plain)) == {"train"} and "train" not in plain.identity()
    assert DataConfig(train=name, tokenise_workers=3).identity() == plain.identity()
    assert DataConfig(train=name, source_end="stop").identity() == plain.identity(), "only a mixture has others to go on with"
    assert set(plain.identity()) == {  # as before there were mixtures: tokens that are in a store are found again
        "heldout_fraction", "text_column", "config_name", "split", "sequence_length", "max_train_tokens", "max_heldout_tokens"
    }  # fmt: skip


def test_what_a_mixture_is_known_by(texts):
    def identity(**settings):
        return json.dumps(DataConfig(**settings).identity(), sort_keys=True)

    both = weighted(texts, a=1, b=1)
    found = [
        identity(train=both),
        identity(train=weighted(texts, a=1, b=2)),
        identity(train=both, source_end="repeat"),
        identity(train=[both[0], both[1] | {"text_column": "body"}]),
        identity(train=both[0] | {"config_name": "wikitext-2-raw-v1"}),
        identity(train=both[0]),
    ]
    assert len(set(found)) == len(found)
    inputs = source_inputs(DataConfig(train=both, heldout=texts["c"][0]))
    assert list(inputs) == ["train[0]", "train[1]", "heldout"] and len(set(inputs.values())) == 3
    config = DataConfig(train=both)
    assert DataConfig.model_validate(config.model_dump(mode="json")) == config


BAD = [
    ("[{source: a.txt, weight: -1}]", r"data.train: source 1: weight: Input should be greater than 0, not -1"),
    ("[a.txt, {source: b.txt, weight: .inf}]", r"data.train: source 2: weight: Input should be a finite number, not inf"),
    ("[a.txt, {source: b.txt, weight: much}]", r"source 2: weight: .*, not 'much'; write {source: name, weight: 1.5}"),
    ("[{source: a.txt, wieght: 1}]", r"source 1 has an unknown setting 'wieght'; did you mean 'weight'"),
    ("[{weight: 1}]", r"source 1: source: Field required"),
    ("[]", r"data.train: an empty list names no text"),
    ("[a.txt, 3]", r"data.train: source 2 is 3; write a name, or {source: name, weight: 1.5}"),
    ("7", r"data.train"),
]


@pytest.mark.parametrize(("train", "words"), BAD)
def test_settings_that_are_no_mixture_are_refused_in_one_line(train, words):
    with pytest.raises(ConfigError, match=words) as error:
        load(overrides=(f"data.train={train}",))
    assert "\n" not in str(error.value)


def test_a_source_without_text_is_named(texts, tmp_path):
    (tmp_path / "blank.jsonl").write_text("\n\n")
    config = DataConfig(train=[*weighted(texts, a=1), str(tmp_path / "blank.jsonl")], sequence_length=LENGTH)
    with pytest.raises(DataError, match=r"data.train\[1\]: '.*blank.jsonl' has no document; take it out of the mixture"):
        tokenise(config, byte_tokenizer(), None)
    (tmp_path / "other.jsonl").write_text('{"body": "x"}\n')
    config = DataConfig(train=[*weighted(texts, a=1), str(tmp_path / "other.jsonl")])
    with pytest.raises(DataError, match=r"data.train\[1\]: '.*other.jsonl': no column 'text'"):
        check_text(config, byte_tokenizer())
    own = DataConfig(train=[*weighted(texts, a=1), {"source": str(tmp_path / "other.jsonl"), "text_column": "body"}])
    check_text(own, byte_tokenizer())
    assert [piece.text for piece in read(own)[0] if piece.source == 1] == ["x"]


@pytest.mark.parametrize("end", ["go_on", "stop", "repeat"])
@pytest.mark.parametrize("first", [True, False])
def test_a_source_of_no_characters_is_refused(texts, tmp_path, end, first):
    import gzip

    (tmp_path / "none.txt.gz").write_bytes(gzip.compress(b""))
    train = [*weighted(texts, a=1), str(tmp_path / "none.txt.gz")]
    config = DataConfig(train=train[::-1] if first else train, source_end=end, sequence_length=LENGTH)
    where = rf"data.train\[{0 if first else 1}\]: '.*none.txt.gz' has no text; name a source with text in it"
    with pytest.raises(DataError, match=where) as error:
        tokenise(config, byte_tokenizer(), None)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"data.train: '.*none.txt.gz' has no text"):
        tokenise(DataConfig(train=train[1], source_end=end, sequence_length=8), byte_tokenizer(), None)


def test_an_empty_file_beside_others_of_its_source_is_no_source_without_text(tmp_path):
    for name, text in (("a.txt", ""), ("b.txt", "some text"), ("c.txt", "")):
        (tmp_path / name).write_text(text)
    config = DataConfig(train=[str(tmp_path), str(tmp_path / "b.txt")], source_end="repeat")
    assert {piece.text for piece in read(config)[0]} == {"", "some text"}


def test_what_is_repeated_is_never_held_out(texts, tmp_path):
    def rows(name, count, size=LENGTH - 1):  # with its separator, a document is a sequence
        found = [f"{name}{i:03d}".ljust(size, "-") for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in found))
        return str(tmp_path / f"{name}.jsonl")

    train = [rows("x", 200), rows("y", 30)]
    config = DataConfig(train=train, source_end="repeat", heldout_fraction=0.2, sequence_length=LENGTH)
    trained, held = (set(map(tuple, tokens.sequences.tolist())) for tokens in tokenise(config, byte_tokenizer(), None))
    assert trained and held and not trained & held and len(trained) + len(held) == 230
    few = config.model_copy(update={"train": DataConfig(train=[rows("v", 3), rows("w", 2)]).train, "heldout_fraction": 1e-9})
    words = (
        r"data.heldout: with data.source_end=repeat .* 80 tokens to train on and 0 tokens held out, and a sequence has 16; name"
    )
    with pytest.raises(DataError, match=words) as error:
        tokenise(few, byte_tokenizer(), None)
    assert "\n" not in str(error.value)
    named = few.model_copy(update={"heldout": texts["c"][0]})
    assert tokenise(named, byte_tokenizer(), None)[0].num_sequences == 5
    assert tokenise(few.model_copy(update={"source_end": "go_on"}), byte_tokenizer(), None)[1].num_sequences == 1


def test_a_data_set_of_the_hub_is_asked_for_by_its_config_and_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(source, config_name, *, split, streaming):
        asked.append((source, config_name, split))
        return [{"text": f"{source} {config_name} {split}"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train = [{"source": "org/wiki", "config_name": "wikitext-2-raw-v1"}, {"source": "org/other", "split": "validation"}]
    config = DataConfig(train=train, config_name="all")
    found, _ = read(config)
    assert asked == [("org/wiki", "wikitext-2-raw-v1", "train"), ("org/other", "all", "validation")]
    assert [piece.text for piece in found] == ["org/wiki wikitext-2-raw-v1 train", "org/other all validation"]
    assert likely_characters(config) == 4 * 51_000_000, "nobody says how large they are"


def test_how_much_text_there_is_likely_to_be(texts, tmp_path):
    import gzip
    import os

    size = os.path.getsize(texts["a"][0])
    assert likely_characters(DataConfig(train=texts["a"][0])) == size
    assert likely_characters(DataConfig(train=texts["a"][0], max_train_tokens=100, max_heldout_tokens=10)) == 440
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(b"x" * 90))
    assert likely_characters(DataConfig(train=[texts["a"][0], str(packed)])) == size + 3 * os.path.getsize(packed)
    assert likely_characters(DataConfig(train=weighted(texts, a=1, b=1), source_end="repeat")) == 4 * 51_000_000


@pytest.mark.parametrize("source_end", ["go_on", "repeat"])
def test_progress_tells_of_every_block_and_never_of_more_than_there_was_said_to_be(texts, tmp_path, monkeypatch, source_end):
    from contextlib import contextmanager

    seen = []

    class Counting:
        @contextmanager
        def stage(self, name, total, unit):
            seen.append([name, total, unit])
            yield self

        def advance(self, count=1, **facts):
            seen.append(count)

    monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", 5000)
    config = DataConfig(train=weighted(texts, a=1, b=1), source_end=source_end, sequence_length=LENGTH)
    artifact = Store(str(tmp_path)).artifact("tokens", {}, {})
    save_tokens(config, byte_tokenizer(), None, artifact, progress=Counting())
    (name, total, unit), *told = seen
    assert (name, unit, total) == ("tokens", "character", likely_characters(config))
    characters = sum(piece_characters(config))
    assert len(told) == len(artifact.names("train")) > 5 and sum(told) == min(total, characters)


def piece_characters(config):
    return [len(piece.text) for piece in read(config)[0]]
