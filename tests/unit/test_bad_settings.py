"""Bad configs and files that settings name, as one table: exit code 2, one line, nothing is written."""

from __future__ import annotations

import gzip
import json

import pytest
from small_runs import save_parent_with_text

from jobs import app

REQUESTS = "input_tokens,output_tokens\n"
QUESTION = json.dumps({"query": "1 + 1 =", "choices": ["2", "3"], "gold": 0}) + "\n"


def config(text):
    """A config file with that content."""
    return lambda folder: ["--config", written(folder / "config.yaml", text)]


def setting(name, file, content):
    """A setting that names a file with that content."""
    return lambda folder: ["--set", f"{name}={json.dumps(written(folder / file, content))}"]


def words(*given):
    return lambda folder: [str(word).replace("FOLDER", str(folder)) for word in given]


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


LENGTHS, QUESTIONS, NARROW = "profile.scenario.lengths", "scoring.downstream", "library.narrow_from"
BAD = {
    "no file": (words("--config", "FOLDER/nowhere.yaml"), "config: there is no file"),
    "a folder": (words("--config", "FOLDER"), "is a folder; name a YAML file"),
    "a name with a zero byte": (words("--config", "a\0b"), "config: "),
    "not UTF-8": (config("seed: 1 # \xe9".encode("latin-1")), "is not UTF-8; save it as UTF-8"),
    "UTF-16": (config("seed: 1".encode("utf-16")), "is not UTF-8"),
    "binary": (config(bytes(range(32)) * 4), "is not YAML"),
    "no YAML": (config("library: {tokens: 1"), "is not YAML (while parsing a flow mapping"),
    "a tab": (config("library:\n\ttokens: 1"), "is not YAML"),
    "a list": (config("- 1\n- 2"), "holds a list; write section: {key: value}"),
    "a word": (config("library"), "holds a str"),
    "zero": (config("0"), "holds a int"),
    "two documents": (config("seed: 1\n---\nseed: 2"), "expected a single document"),
    "a key twice": (config("seed: 1\nseed: 2"), "'seed' is there twice"),
    "a key twice, deep": (config("library:\n  tokens: 512\n  tokens: 1024"), "'tokens' is there twice"),
    "a key that is a number": (config("library: {1: 2}"), "library"),
    "an object of Python": (config("seed: !!python/object/apply:os.getpid []"), "could not determine a constructor"),
    "a number of 5000 digits": (config(f"seed: {'1' * 5000}"), "is not YAML (Exceeds the limit"),
    "a date that is none": (config("seed: 2020-13-45"), "month must be in 1..12"),
    "too deep": (config("[" * 5000), "too deep"),
    "holds itself": (config("library: &x {tokens: *x}"), "is not YAML (Circular reference"),
    "a huge seed": (config(f"seed: {10**30}"), "seed: Input should be less than"),
    "a huge count": (config(f"library: {{tokens: {10**30}}}"), "library.tokens: Input should be less than"),
    "not a number": (config("library: {learning_rate: .nan}"), "library.learning_rate: write a number above 0, or auto"),
    "infinite": (config("cluster: {step_timeout_s: .inf}"), "cluster.step_timeout_s: Input should be a finite number"),
    "a section that is a list": (config("library: [1]"), "library: Input should be a valid dictionary"),
    "an unknown setting": (config("library: {token: 1}"), "library.token: unknown setting; did you mean 'tokens'?"),
    "a long value": (config(f"gkd: {{tokens: {'x' * 5000}}}"), "gkd.tokens: Input should be a valid integer"),
    "no assignment": (words("--set", "library.tokens"), "--set: 'library.tokens' is no assignment"),
    "no YAML to set": (words("--set", "library.tokens={"), "--set: '{' is not YAML"),
    "a huge number to set": (words("--set", f"seed={'9' * 5000}"), "is not YAML (Exceeds the limit"),
    "no recipe": (words("--recipe", "../tiny"), "recipe: unknown recipe '../tiny'"),
    "no requests": (setting(LENGTHS, "r.csv", REQUESTS), "has no requests"),
    "other columns": (setting(LENGTHS, "r.csv", "in,out\n1,2\n"), "it needs columns input_tokens and output_tokens"),
    "tokens that are words": (setting(LENGTHS, "r.csv", REQUESTS + "many,2\n"), "cannot be read"),
    "half a token": (setting(LENGTHS, "r.csv", REQUESTS + "1.5,2\n"), "is no number of tokens"),
    "a row too short": (setting(LENGTHS, "r.csv", REQUESTS + "4\n"), "cannot be read"),
    "a field too long": (setting(LENGTHS, "r.csv", REQUESTS + "4" * 140_000 + ",2\n"), "field larger than field limit"),
    "requests in Latin-1": (setting(LENGTHS, "r.csv", REQUESTS.encode() + b"\xe9,2\n"), "cannot be read"),
    "no parquet": (setting(LENGTHS, "r.parquet", b"PAR1 is not enough"), "cannot be read"),
    "no JSON": (setting(LENGTHS, "r.jsonl", "{"), "cannot be read"),
    "rows that are lists": (setting(LENGTHS, "r.jsonl", "[1, 2]\n"), "cannot be read"),
    "requests in a text": (setting(LENGTHS, "r.txt", REQUESTS), "is no .csv, .jsonl or .parquet file"),
    "no questions": (setting(QUESTIONS, "q.jsonl", ""), "scoring.downstream: "),
    "no question": (setting(QUESTIONS, "q.jsonl", '{"query": "a"}\n'), "q.jsonl:1 is no question (without choices and gold)"),
    "broken questions": (setting(QUESTIONS, "q.jsonl", QUESTION + "{"), "line 2: no valid JSON"),
    "questions in Latin-1": (setting(QUESTIONS, "q.jsonl", b'{"query": "\xe9"}\n'), "is not UTF-8"),
    "gold that is infinite": (
        *(setting(QUESTIONS, "q.jsonl", QUESTION.replace(": 0", ": Infinity")),),
        "gold is inf",
    ),
    "gold out of reach": (setting(QUESTIONS, "q.jsonl", QUESTION.replace(": 0", ": 2")), "gold 2 among 2 choices"),
    "no gzip": (setting(QUESTIONS, "q.jsonl.gz", QUESTION), "cannot be read"),
    "half a gzip": (setting(QUESTIONS, "q.jsonl.gz", gzip.compress(QUESTION.encode() * 50)[:-20]), "cannot be read"),
    "an architecture that is none": (setting(NARROW, "a.json", "{}"), "holds no architectures (KeyError"),
    "an architecture of 2000 brackets": (setting(NARROW, "a.json", "[" * 200_000), "holds no architectures"),
    "a table that is none": (setting(NARROW, "a.parquet", "PAR1"), "holds no architectures"),
    "no architecture": (words("--set", f"{NARROW}=FOLDER/nowhere.json"), "library.narrow_from: "),
    "no such filesystem": (words("--set", f"{NARROW}=nowhere://a.json"), "library.narrow_from: "),
    "a library that is none": (words("--set", "library.start_from=FOLDER"), "is no finished library"),
    "numbers hidden in too little": (
        words("--set", "evaluate.retrieval_tokens=[100, 40]"),
        "40 and 100 tokens do not hold a question of",
    ),
    "a half of a fixed layer that is none": (
        words("--set", "search.limits={speedup: 2, fixed: {0: {atention: noop}}}"),
        "search.limits.fixed.0.atention: unknown setting; did you mean 'attention'? known: attention, ffn",
    ),
    "a setting of a stage that is none": (
        words("--set", "gkd.stages=[{sequence_length: 256, tokens: 256, micro_batch_tokens: 256, token: 1}]"),
        "gkd.stages.0.token: unknown setting; did you mean 'tokens'? known: ",
    ),
    "a rival that is none": (
        words("--set", "search.rivals=[gredy]"),
        "search.rivals: unknown searcher 'gredy'; did you mean 'greedy'? known: ",
    ),
    "a rival at no path": (words("--set", "search.rivals=['nowhere.ours:X']"), "search.rivals: searcher 'nowhere.ours:X' cannot"),
    "a searcher that is none": (words("--set", "search.searcher=gredy"), "search.searcher: unknown searcher 'gredy'; did you"),
    "held-out text that is trained on": (words("--set", "data.heldout=TEXT"), "text.txt is text of data.train, too; name other"),
    "a store among the text": (words("--data", "FOLDER"), "all of which is read as data.train; name a store elsewhere"),
    "a store of no filesystem": (words("--store", "nowhere://store"), "store: 'nowhere://store' cannot be"),
    "a store by URL among the text": (
        words("--data", "FOLDER", "--store", "file://FOLDER/store"),
        "all of which is read as data.train; name a store elsewhere",
    ),
    "a store in a bucket without a name": (
        words("--store", "s3://"),
        "store: 's3://' names nothing behind its protocol; write s3://BUCKET/FOLDER",
    ),
    "a space of the parent's own sizes": (
        words("--set", "space.attention=['gqa:2']", "--set", "space.ffn=['ffn:100%']"),
        "space: nothing in attention ['gqa:2'] and ffn ['ffn:100%'] differs from the parent's own; name variants",
    ),
    "a number with a zero before it": (config("seed: 010"), "010 is 8 to YAML; write 8 or 10, or quote it"),
    "a negative number with a zero before it": (config("seed: -0_10"), "-0_10 is -8 to YAML; write -8 or -10, or quote it"),
    "a number with a colon": (words("--set", "seed=1:30"), "1:30 is 90 to YAML; write 90, or quote it"),
    "a list within quotes": (
        words("--set", "space.ffn='[noop, linear]'"),
        "space.ffn: Input should be a list: write [noop, linear] (",
    ),
    "a word that is a number to YAML": (
        words("--set", "revision=1234567"),
        "valid string: write '1234567' in quotes (given: 1234567)",
    ),
    "a word that is no word to YAML": (
        config("data: {config_name: no}"),
        "data.config_name: Input should be a valid string: write it in quotes",
    ),
    "a revision of a folder": (words("--set", "revision=main"), "revision: 'main' is of a hub id, and "),
    "a revision of a URL": (
        words("--set", "revision=main", "--parent", "file:///nowhere"),
        "revision: 'main' is of a hub id, and 'file:///nowhere' is none; leave it out",
    ),
    "a store that is a file": (words("--store", "FOLDER/text.txt"), "cannot be written"),
}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return save_parent_with_text(tmp_path_factory.mktemp("parent"))


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(parent, tmp_path, name, capsys, monkeypatch):
    made, wanted = BAD[name]
    (tmp_path / "text.txt").write_text("text")
    given = made(tmp_path)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    store = [] if "--store" in given else ["--store", str(tmp_path / "store")]
    plain = ["--set", "data.sequence_length=16", "--parent", str(parent[0]), "--data", str(parent[1])]
    capsys.readouterr()
    code = app.run(["build-library", *plain, *store, *(word.replace("TEXT", str(parent[1])) for word in given)])
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and wanted in err and len(err) < 700, err
    assert not list((tmp_path / "store").glob("**/*")) if (tmp_path / "store").exists() else True


def test_a_submitted_job_has_no_use_for_a_relative_store(parent, capsys, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert app.run(["build-library", "--parent", str(parent[0]), "--data", str(parent[1]), "--store", "runs"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: store: 'runs' is relative, and a submitted job's working folder is thrown away"
    )


def test_questions_may_be_compressed(tmp_path):
    from puzzle_ray.scoring.downstream import read_questions

    path = tmp_path / "q.jsonl.gz"
    path.write_bytes(gzip.compress(QUESTION.encode() * 3))
    assert len(read_questions(str(path))) == 3
