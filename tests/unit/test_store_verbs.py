"""`puzzle-ray store`: what is in a store, whether it is whole, what it takes, and what may go."""

import json
import os
import time
from pathlib import Path

import pytest

from jobs import app
from jobs import store as verbs
from puzzle_ray.store import RECORD, SCHEMA_VERSION, Store


@pytest.fixture
def store(tmp_path):
    """tokens <- library, finished; a report that nothing reads; a child that is not finished."""
    store = Store(str(tmp_path / "store"))
    key = "parent"
    for stage, count in (("tokens", 1500), ("library", 3000), ("report", 10)):
        artifact = store.artifact(stage, {}, {"made from": key} if stage != "report" else {})
        artifact.write("data.bin", bytes(count))
        artifact.finish({"things": count})
        key = artifact.key
    store.artifact("child", {}, {}).write_json("items/a.json", 1)
    return store


@pytest.fixture
def said(capsys):
    def run(store, *words):
        code = app.run(["store", *words, "--store", store.root])
        out = capsys.readouterr()
        return code, out.out.splitlines(), out.err.splitlines()

    return run


def age(store, stage, days):
    for path in Path(store.root).glob(f"{stage}-*/**/*"):
        os.utime(path, (time.time() - days * 86400,) * 2)


def folder(store, stage):
    return next(Path(store.root).glob(f"{stage}-*"))


def test_help_names_the_verbs(capsys):
    assert app.run(["store", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f" {verb.name} " in out for verb in verbs.GROUP.verbs)
    assert app.run(["--help"]) == 0 and " store " in capsys.readouterr().out


def test_ls_is_one_plain_line_an_artifact(store, said):
    code, lines, _ = said(store, "ls")
    rows = {line.split("\t")[0]: line.split("\t") for line in lines}
    assert code == 0 and set(rows) == {"tokens", "library", "report", "child"}
    stage, key, state, size, written, fact = rows["tokens"]
    assert folder(store, "tokens").name == f"{stage}-{key}" and state == "finished" and size.endswith(" kB")
    assert time.strptime(written, "%Y-%m-%d %H:%M") and fact == "things 1500"
    assert rows["child"][2] == "unfinished" and rows["child"][5] == ""


def test_a_terminal_gets_a_table(store, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    assert app.run(["store", "ls", "--store", store.root]) == 0
    first = capsys.readouterr().out.splitlines()
    assert any("stage" in line and "fact" in line for line in first) and any("library" in line for line in first)


def test_verify_names_what_is_damaged_and_what_to_do(store, said):
    assert said(store, "verify") == (0, [], ["4 artifacts, nothing is damaged"])
    path = folder(store, "library") / "data.bin"
    path.write_bytes(bytes(2999) + b"1")
    name = folder(store, "library").name
    code, lines, errors = said(store, "verify")
    assert code == 2 and lines == [f"{name}/data.bin is damaged (its checksum is not the one that was written)"]
    assert errors == [
        "1 of 4 artifacts are damaged (library): the command that made it makes what is lost again, and nothing else"
    ]
    assert said(store, "verify", folder(store, "tokens").name)[0] == 0
    code, _, errors = said(store, "verify", "library")
    assert code == 2 and errors == [
        "error: store: 'library' names no artifact; name a folder such as library-0123456789ab, as `ls` shows them"
    ]


def test_what_another_version_wrote_is_not_damaged(store, said):
    record = folder(store, "report") / RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | {"schema": 2}))
    words = f"was written by an older version (schema 2, this one reads {SCHEMA_VERSION})"
    assert said(store, "verify")[:2] == (0, [f"{folder(store, 'report').name}/{RECORD} {words}"])
    rows = {line.split("\t")[0]: line.split("\t")[5] for line in said(store, "ls")[1]}
    assert rows["report"] == f"record {words}"


def test_what_verify_found_is_made_again_by_the_next_run(store, said):
    path = folder(store, "library") / "data.bin"
    path.write_bytes(bytes(2999) + b"1")
    said(store, "verify")
    rows = {line.split("\t")[0]: line.split("\t")[2] for line in said(store, "ls")[1]}
    assert rows["library"] == "damaged" and rows["tokens"] == "finished"


def test_du_adds_up(store, said):
    code, lines, _ = said(store, "du")
    assert code == 0 and [line.split("\t")[0] for line in lines] == ["library", "tokens", "report", "child", "all"]
    assert [verbs.size(count) for count in (0, 999, 1500, 2.5e9, 3e15)] == ["0 B", "999 B", "1.5 kB", "2.5 GB", "3000.0 TB"]


def test_gc_lists_first_and_removes_with_yes(store, said):
    assert said(store, "gc")[1:] == ([], ["0 may go, 0 B; --yes removes them"]), "nothing is older than 30 days"
    for stage in ("tokens", "library", "report", "child"):
        age(store, stage, 20)
    code, lines, errors = said(store, "gc", "--older-than", "10")
    going = {line.split("\t")[0].rpartition("-")[0] for line in lines}
    assert code == 0 and going == {"library", "report", "child"}, "tokens are what the library was made from"
    assert errors[0].startswith("3 may go, ") and folder(store, "child").is_dir()
    with store.artifact("child", {}, {}).lease():
        assert said(store, "gc", "--older-than", "10", "--yes")[0] == 0
        for stage in ("tokens", "library", "report", "child"):
            assert folder(store, stage).is_dir(), "a run works on one, and may read the others"
    assert said(store, "gc", "--older-than", "10", "--yes")[0] == 0
    assert [path for path in Path(store.root).glob("tokens-*")] and not list(Path(store.root).glob("child-*"))
    assert not list(Path(store.root).glob("library-*")) and not list(Path(store.root).glob("report-*"))


def test_no_store_is_said(tmp_path, said):
    for words in (["ls"], ["verify"], ["du"], ["gc"]):
        code, out, errors = said(Store(str(tmp_path / "nowhere")), *words)
        assert code == 2 and not out and errors[0].startswith("error: store: there is no store at ")
    assert not (tmp_path / "nowhere").exists()
