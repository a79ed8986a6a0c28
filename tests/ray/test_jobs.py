"""The command line, run as a user would: a killed run continues; the artifacts are real; what is wrong is said before any work."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from pickles import pickles_in
from safetensors.torch import load_file
from small_models import save_parent
from waiting import until

from jobs import app
from puzzle_ray.artifacts import Scores
from puzzle_ray.models.child import load_model
from puzzle_ray.pipeline import compress
from puzzle_ray.scoring.downstream import read_questions

SCRIPT = shutil.which("puzzle-ray", path=str(Path(sys.executable).parent))  # where the package is installed
COMMAND = [SCRIPT] if SCRIPT else [sys.executable, "-m", "jobs.app"]
ROOT = Path(__file__).parents[2]
WORDS = ("compress", "--recipe", "tiny")
SMALL = {  # recipe `tiny` from end to end in a minute
    "tiny_parent_steps": 24,
    "library.tokens": 4096,
    "library.calibration_tokens": 2048,
    "library.validation_tokens": 2048,
    "library.micro_batch_tokens": 512,
    "library.checkpoint_every": 2,
    "scoring.tokens": 1024,
    "scoring.micro_batch_tokens": 512,
    "search.measure_tokens": 1024,
    "search.candidates": 2,
    "search.rivals": ["greedy"],
    "gkd.tokens": 2048,
    "gkd.micro_batch_tokens": 512,
    "gkd.num_workers": 1,
    "gkd.checkpoint_every": 2,
    "gkd.heldout_tokens": 1024,
    "gkd.heldout_looks": 2,
    "evaluate.tokens": 1024,
    "evaluate.repeats": 1,
    "evaluate.sample_tokens": 8,
    "profile.repeats": 2,
    "profile.stack": 1,
    "profile.scenario": {"batch_size": 2, "input_tokens": 16, "output_tokens": 4},
    "space.attention": ["parent", "noop"],
    "space.ffn": ["parent", "ffn:50%", "noop"],
    "search.sweep": {"speedup": None, "params_fraction": [0.9, 0.8, 0.01]},
    "search.limits": {"speedup": None, "params_fraction": 0.9},  # bytes decide, no measured time
}


def words_of(settings):
    return [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """SMALL, and questions that blocks are scored by."""
    questions = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [{"query": f"def function_{n}(self", "choices": [", value):", " banana"], "gold": n % 2} for n in range(12)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SMALL | {"scoring.downstream": str(questions)}


def run(*words, cwd=ROOT, timeout=1200):
    return subprocess.run([*COMMAND, *words], cwd=cwd, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def away(tmp_path_factory):
    """A working folder that is not the checkout, where the package is installed; the checkout, where it is not."""
    return tmp_path_factory.mktemp("away") if SCRIPT else ROOT


@pytest.fixture(scope="module")
def whole(settings, away, tmp_path_factory):
    """A run that was killed with SIGKILL while its library was trained, then started again: (store, what was there then, the second)."""
    store = tmp_path_factory.mktemp("store")
    words = [*WORDS, "--store", str(store), *words_of(settings)]
    command = [*COMMAND, *words]
    with subprocess.Popen(
        command, cwd=away, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as first:
        checkpoints = lambda: list(store.glob("library-*/checkpoints/*"))  # noqa: E731
        until(lambda: checkpoints() or first.poll() is not None, "the library is in training", 600)
        os.killpg(first.pid, signal.SIGKILL)
    killed_in = [path.name for path in store.iterdir()]
    return store, killed_in, run(*words, cwd=away)


STAGES = (
    *("tiny_parent", "tokens", "library", "profile", "scores", "architecture"),
    *("child", "gkd", "quality", "evaluation", "sweep", "report"),
)


def test_a_killed_run_continues_to_the_end(whole):
    store, killed_in, second = whole
    assert second.returncode == 0, second.stderr
    assert any(name.startswith("library-") for name in killed_in) and not any(name.startswith("scores-") for name in killed_in)
    assert "[tokens] already there" in second.stderr and "[tiny_parent] already there" in second.stderr
    for stage in STAGES:
        assert len(list(store.glob(f"{stage}-*/artifact.json"))) == 1, stage
        assert f"[{stage}]" in second.stderr
    assert "serve it: puzzle-ray serve-child --child" in second.stdout


def test_no_file_of_a_store_is_a_pickle(whole):
    store, *_ = whole
    assert not pickles_in(store) and not list(store.rglob("*.pkl"))


def test_a_finished_run_does_nothing_again(whole, settings, away):
    store, *_ = whole

    def files():
        """With their times; every run has a log of its own."""
        return {
            path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file() and store / "log" not in path.parents
        }

    before = files()
    again = run(*WORDS, "--store", str(store), *words_of(settings), cwd=away)
    assert again.returncode == 0 and again.stderr.count("already there") == len(STAGES)
    assert files() == before


def test_status_before_behind_and_after_a_change(whole, settings, tmp_path, capsys, monkeypatch):
    store, *_ = whole
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # the cluster that other tests have here has other nodes

    def states(*words, at=store):
        assert app.run(["status", "--recipe", "tiny", "--store", str(at), *words_of(settings), *words]) == 0
        return {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()}

    assert set(states()) == set(STAGES) and all(words.startswith("finished") for words in states().values())
    changed = states("--set", "scoring.tokens=512")
    assert changed["library"].startswith("finished") and "changed: scoring.tokens 1024 -> 512" in changed["scores"]
    assert "reads scores, which would run" in changed["architecture"] and changed["child"].startswith("to do")
    assert all(words.startswith("to do") for words in states(at=tmp_path / "empty").values())
    assert not (tmp_path / "empty").exists(), "asking writes nothing"


def test_the_method_in_one_process_gives_the_same_child_bit_for_bit(whole, settings, tmp_path):
    """What is not the matter here (training the parent, measuring costs) is copied: it is found under the same keys."""
    store, *_ = whole
    copied = ("tiny_parent", "tokens", "profile", "evaluation")
    for stage in copied:
        source = next(store.glob(f"{stage}-*"))
        shutil.copytree(source, tmp_path / source.name)
    found = compress(recipe="tiny", store=str(tmp_path), settings=settings)
    by_stage = {path.name.partition("-")[0]: path.name for path in tmp_path.iterdir() if (path / "artifact.json").is_file()}
    assert by_stage.keys() == set(STAGES) - {"sweep", "report"}
    assert all((store / name / "artifact.json").is_file() for name in by_stage.values()), "the same keys"
    for stage in ("library", "child", "gkd"):
        for file in (tmp_path / by_stage[stage]).rglob("*.safetensors"):
            mine, theirs = load_file(file), load_file(store / file.relative_to(tmp_path))
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine), file.name
    tables = {"scores": "scores.parquet", "library": "library.parquet", "quality": "quality.json"}
    for name in (f"{by_stage[stage]}/{table}" for stage, table in tables.items()):
        assert (tmp_path / name).read_bytes() == (store / name).read_bytes()
    assert Path(found.child) == tmp_path / by_stage["gkd"] / "child"


def test_the_child_meets_its_limit_and_loads(whole):
    store, *_ = whole
    child = load_model(next(store.glob("gkd-*/child")))
    parent = load_model(next(store.glob("tiny_parent-*/parent/model")))
    assert child.num_parameters() <= 0.9 * parent.num_parameters()
    architecture = json.loads(next(store.glob("architecture-*/architecture.json")).read_text())
    assert architecture["predicted"]["num_params"] == child.num_parameters() and architecture["status"] in ("optimal", "measured")
    assert [tuple(c.values()) for c in child.config.puzzle_layers] == [tuple(c.values()) for c in architecture["choices"]]
    with torch.no_grad():
        assert torch.isfinite(child(torch.arange(16).unsqueeze(0)).logits).all()


def test_children_answer_the_questions_that_no_block_was_scored_by(whole, settings):
    store, *_ = whole
    models = json.loads(next(store.glob("evaluation-*/evaluation.json")).read_text())["models"]
    kept = read_questions(settings["scoring.downstream"], "test")
    assert {model["downstream_questions"] for model in models.values()} == {len(kept)} and 0 < len(kept) < 12
    rows = Scores.from_parquet(next(store.glob("scores-*/scores.parquet")).read_bytes()).rows
    assert {row.metric for row in rows} >= {"kl", "downstream"}


def test_an_impossible_point_of_a_sweep_is_reported_not_fatal(whole):
    store, *_ = whole
    points = json.loads(next(store.glob("sweep-*/sweep.json")).read_text())
    impossible = [point for point in points if point["architecture"] is None]
    assert len(points) == 3 and len(impossible) == 1 and "best reachable" in impossible[0]["infeasible_reason"]


def test_the_report_is_one_page_that_names_the_run(whole):
    store, *_ = whole
    page = next(store.glob("report-*/index.html")).read_text()
    assert page.startswith("<!DOCTYPE html>") and "layer" in page and "http://" not in page


def test_a_budget_below_the_cheapest_architecture_names_what_is_reachable(whole, settings, local_ray, capsys):
    store, *_ = whole
    changed = settings | {"search.limits": {"speedup": None, "params_fraction": 0.01}}
    assert app.run(["search-architecture", "--recipe", "tiny", "--store", str(store), *words_of(changed)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: no architecture in this search space meets params") and "the best reachable is" in last


def test_a_sweep_over_contexts_measures_and_distils_its_frontier(whole, settings, local_ray, capsys):
    store, *_ = whole
    axes = {"speedup": None, "params_fraction": [0.85], "input_tokens": [8, 16]}
    changed = settings | {"search.sweep": axes, "search.sweep_measure": True, "search.sweep_gkd": True, "gkd.tokens": 512}
    common = ["--recipe", "tiny", "--store", str(store), *words_of(changed)]
    words = ["sweep-budgets", *common]
    assert app.run(["profile-blocks", *common]) == 0  # this cluster's own: it has other nodes than the first run's
    profiles = len(list(store.glob("profile-*/artifact.json")))
    assert app.run(words) == 0
    said = capsys.readouterr().err
    newest = max(store.glob("sweep-*"), key=lambda path: path.stat().st_mtime)
    with (newest / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    asked = [(float(row["asked_params_fraction"]), float(row["asked_input_tokens"])) for row in rows]
    assert asked == [(0.85, 8.0), (0.85, 16.0)]
    assert len(list(store.glob("profile-*/artifact.json"))) == profiles + 1, "one profile per context, the run's own used again"
    on = [row for row in rows if row["on_frontier"] == "True"]
    assert on and all(bool(row[name]) == (row in on) for row in rows for name in ("distilled_kl", "measured_kl"))
    children = {row["choices"] for row in on}
    assert said.count("[heldout]") >= len(children) and len(list(store.glob("heldout-*/artifact.json"))) == len(children)
    assert app.run(words) == 0
    said = capsys.readouterr().err
    assert "[sweep] already there" in said and "[gkd]" not in said


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A random parent with a tokenizer, and text for it."""
    folder = save_parent(tmp_path_factory.mktemp("parent"), vocab_size=VOCAB_SIZE + 7)
    byte_tokenizer().save_pretrained(folder)
    text = folder / "train.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 200)
    return {"parent": folder, "data": text}


BAD = {
    "a setting that is none": ("compress", {"librari.tokens": 1}, {}, "librari: unknown setting; did you mean 'library'?"),
    "a parent that is not there": ("compress", {}, {"parent": "nowhere/at/all"}, "parent: there is no folder 'nowhere/at/all'"),
    "text that is not there": ("compress", {}, {"data": "nowhere.txt"}, "data.train: no "),
    "a store that cannot be": ("compress", {}, {"store": "/proc/none"}, "store: '/proc/none' cannot be written"),
    "no Ray at an address": (
        "compress",
        {"cluster.address": "127.0.0.1:9"},
        {},
        "cluster.address: no Ray answers at '127.0.0.1:9'",
    ),
    "an address that is none": ("compress", {"cluster.address": "nowhere"}, {}, "cluster.address: 'nowhere' is no address"),
    "Ray Client": ("compress", {"cluster.address": "ray://127.0.0.1:9"}, {}, "use `ray job submit`, or host:port"),
    "a variant that is none": (
        *("search-architecture", {"space.attention": ["gqq"]}, {}),
        "space.attention: unknown variant 'gqq'; did you mean 'gqa'?",
    ),
    "prompts too long": ("compress", {"profile.scenario": {"input_tokens": 4096}}, {}, "do not fit its 128 positions"),
}


def called(verb, settings, paths):
    named = [word for name, value in paths.items() for word in (f"--{name}", str(value))]
    short = {"data.sequence_length": 16, "profile.scenario.input_tokens": 16, "profile.scenario.output_tokens": 4}
    return app.run([verb, *named, *words_of(short | settings)])


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_in_one_line_before_work_starts(inputs, tmp_path, name, capsys, monkeypatch):
    """In this process, through the application itself; a Ray that other tests have here must not be what answers."""
    verb, settings, paths, words = BAD[name]
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code = called(verb, settings, inputs | {"store": tmp_path / "store"} | paths)
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ") and words in err
    assert not list((tmp_path / "store").glob("*-*"))


def test_a_port_that_is_silent_is_given_up_in_time(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        settings = {"cluster.address": address, "cluster.connect_timeout_s": 2}
        assert called("compress", settings, inputs | {"store": tmp_path / "store"}) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: cluster.address: what listens at '{address}' does not answer as Ray within 2 s")


def test_empty_data_and_an_unsupported_family(inputs, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert called("compress", {}, inputs | {"store": tmp_path / "store", "data": empty}) == 2
    assert capsys.readouterr().err == f"error: data.train: {str(empty)!r} is empty; name a file with text in it\n"
    bloom = tmp_path / "bloom"
    bloom.mkdir()
    (bloom / "config.json").write_text('{"model_type": "bloom"}')
    assert called("compress", {}, inputs | {"store": tmp_path / "store", "parent": bloom}) == 2
    err = capsys.readouterr().err
    assert "parent: family 'bloom' is not supported" in err and err.count("\n") == 1
