"""The command line: one line for what the user can mend, before any work; a killed run continues; the artifacts are real."""

import csv
import json
import os
import signal
import socket
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_models import save_parent
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from puzzle_ray.artifacts import Scores
from puzzle_ray.models.child import load_model
from puzzle_ray.scoring.downstream import read_questions

ROOT = Path(__file__).parents[2]
QUESTIONS = "questions.jsonl"
SMALL = (
    "data.sequence_length=16",
    "library.tokens=512",
    "library.calibration_tokens=64",
    "library.validation_tokens=64",
    "library.micro_batch_tokens=64",
    "library.checkpoint_every=2",
    "scoring.tokens=64",
    "scoring.micro_batch_tokens=64",
    "gkd.tokens=512",
    "gkd.micro_batch_tokens=64",
    "gkd.num_workers=1",
    "gkd.checkpoint_every=2",
    "evaluate.tokens=64",
    "evaluate.repeats=1",
    "evaluate.sample_tokens=8",
    "evaluate.prompt=abc",
    "profile.repeats=2",
    "profile.stack=1",
    "profile.scenario.batch_size=2",
    "profile.scenario.input_tokens=16",
    "profile.scenario.output_tokens=4",
    "space.attention=[parent,noop]",
    "space.ffn=[parent,'ffn:50%',noop]",
    "search.sweep.speedup=[1.05,1.2,50]",
    "search.limits.speedup=null",
    "search.limits.params_fraction=0.9",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A random parent with a tokenizer of letters, and text for it."""
    folder = save_parent(tmp_path_factory.mktemp("parent"))
    letters = "abcdefghijklmnopqrstuvwxyz "
    raw = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(letters)}}, unk_token="<s>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<s>").save_pretrained(folder)
    text = tmp_path_factory.mktemp("text") / "train.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 200)
    questions = [
        {"query": f"the {a} is", "choices": ["quick", "lazy"], "gold": i % 2} for i, a in enumerate(string.ascii_lowercase)
    ]
    (text.parent / QUESTIONS).write_text("".join(json.dumps(question) + "\n" for question in questions))
    return folder, text


def command(verb, inputs, *settings, store, parent=None, data=None):
    folder, text = inputs
    questions = f"scoring.downstream={text.parent / QUESTIONS}"
    words = [w for s in (*SMALL, questions, *settings) for w in ("--set", s)]
    return [
        sys.executable,
        "-m",
        f"jobs.{verb}",
        "--parent",
        str(parent or folder),
        "--data",
        str(data or text),
        "--store",
        str(store),
        *words,
    ]


def run(words, timeout=240):
    return subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A run that was killed with SIGKILL while its library was trained, then started again."""
    store = tmp_path_factory.mktemp("store")
    words = command("compress", inputs, store=store)
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as first:
        deadline = time.monotonic() + 120
        while not list(store.glob("library-*/checkpoints/*")) and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(first.pid, signal.SIGKILL)
    killed_in = [path.name for path in store.iterdir()]
    return store, killed_in, run(words)


def test_a_killed_run_continues_to_the_end(whole):
    store, killed_in, second = whole
    assert second.returncode == 0, second.stderr
    assert any(name.startswith("library-") for name in killed_in) and not any(name.startswith("scores-") for name in killed_in)
    assert "[tokens] already there" in second.stderr
    stages = ["tokens", "library", "profile", "scores", "architecture", "child", "gkd", "evaluation", "sweep", "report"]
    for stage in stages:
        assert len(list(store.glob(f"{stage}-*/artifact.json"))) == 1, stage
        assert f"[{stage}]" in second.stderr


def test_a_finished_run_does_nothing_again(whole, inputs):
    store, *_ = whole
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    again = run(command("compress", inputs, store=store))
    assert again.returncode == 0 and again.stderr.count("already there") >= 10
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()} == before


def test_the_child_meets_its_limit_and_loads(whole, inputs):
    store, *_ = whole
    child = load_model(next(store.glob("gkd-*/child")))
    parent = load_model(inputs[0])
    assert child.num_parameters() <= 0.9 * parent.num_parameters()
    architecture = json.loads(next(store.glob("architecture-*/architecture.json")).read_text())
    assert architecture["predicted"]["num_params"] == child.num_parameters() and architecture["status"] == "optimal"
    assert [tuple(c.values()) for c in child.config.puzzle_layers] == [tuple(c.values()) for c in architecture["choices"]]
    with torch.no_grad():
        assert torch.isfinite(child(torch.arange(16).unsqueeze(0)).logits).all()


def test_children_answer_the_questions_that_no_block_was_scored_by(whole, inputs):
    store, *_ = whole
    models = json.loads(next(store.glob("evaluation-*/evaluation.json")).read_text())["models"]
    kept = read_questions(str(inputs[1].parent / QUESTIONS), "test")
    assert {model["downstream_questions"] for model in models.values()} == {len(kept)} and 0 < len(kept) < 26
    rows = Scores.from_parquet(next(store.glob("scores-*/scores.parquet")).read_bytes()).rows
    assert {row.metric for row in rows} >= {"kl", "downstream"}


def test_an_impossible_point_of_a_sweep_is_reported_not_fatal(whole):
    store, *_ = whole
    points = json.loads(next(store.glob("sweep-*/sweep.json")).read_text())
    assert points[-1]["architecture"] is None and "best reachable" in points[-1]["infeasible_reason"]


def test_the_report_is_one_page_that_names_the_run(whole):
    store, *_ = whole
    page = next(store.glob("report-*/index.html")).read_text()
    assert page.startswith("<!DOCTYPE html>") and "layer" in page and "http://" not in page


@pytest.mark.parametrize(
    ("verb", "settings", "paths", "words"),
    [
        ("compress", ("librari.tokens=1",), {}, "librari: unknown setting; did you mean 'library'?"),
        ("compress", (), {"parent": "nowhere/at/all"}, "parent: there is no folder 'nowhere/at/all'"),
        ("compress", (), {"data": "nowhere.txt"}, "data.train: no .txt, .jsonl or .parquet file at 'nowhere.txt'"),
        ("compress", (), {"store": "/proc/none"}, "store: '/proc/none' cannot be written"),
        ("compress", ("cluster.address='127.0.0.1:9'",), {}, "cluster.address: no Ray answers at '127.0.0.1:9'"),
        ("compress", ("cluster.address=nowhere",), {}, "cluster.address: 'nowhere' is no address"),
        ("compress", ("cluster.address='ray://127.0.0.1:9'",), {}, "use `ray job submit`, or host:port"),
        ("search_architecture", ("space.attention=[gqq]",), {}, "space.attention: unknown variant 'gqq'; did you mean 'gqa'?"),
        ("compress", ("profile.scenario.input_tokens=4096",), {}, "do not fit its 128 positions"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_work_starts(inputs, tmp_path, verb, settings, paths, words):
    done = run(command(verb, inputs, *settings, **({"store": tmp_path / "store"} | paths)), timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert words in done.stderr
    assert not list((tmp_path / "store").glob("*-*")) if (tmp_path / "store").exists() else True


def test_a_port_that_is_silent_is_given_up_in_time(inputs, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        settings = (f"cluster.address='{address}'", "cluster.connect_timeout_s=3")
        done = run(command("compress", inputs, *settings, store=tmp_path / "store"), timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cluster.address: what listens at '{address}' does not answer as Ray within 3 s")


def test_empty_data_and_an_unsupported_family(inputs, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    done = run(command("compress", inputs, store=tmp_path / "store", data=empty), timeout=60)
    assert (done.returncode, done.stderr) == (2, f"error: data.train: {str(empty)!r} is empty; name a file with text in it\n")
    gpt = tmp_path / "bloom"
    gpt.mkdir()
    (gpt / "config.json").write_text('{"model_type": "bloom"}')
    done = run(command("compress", inputs, store=tmp_path / "store", parent=gpt), timeout=60)
    assert done.returncode == 2 and "parent: family 'bloom' is not supported" in done.stderr and done.stderr.count("\n") == 1


def test_a_budget_below_the_cheapest_architecture_names_what_is_reachable(whole, inputs):
    store, *_ = whole
    done = run(command("search_architecture", inputs, "search.limits.params_fraction=0.01", store=store))
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
        "error: no architecture in this search space meets params"
    )
    assert "the best reachable is" in done.stderr


def test_a_sweep_over_contexts_measures_and_distils_its_frontier(whole, inputs):
    store, *_ = whole
    axes = "{speedup: null, params_fraction: [0.8, 0.95], input_tokens: [8, 16]}"
    settings = (f"search.sweep={axes}", "search.sweep_measure=true", "search.sweep_gkd=true")
    words = command("sweep_budgets", inputs, *settings, store=store)
    done = run(words)
    assert done.returncode == 0, done.stderr
    newest = max(store.glob("sweep-*"), key=lambda path: path.stat().st_mtime)
    with (newest / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    asked = [(float(row["asked_params_fraction"]), float(row["asked_input_tokens"])) for row in rows]
    assert asked == [(0.8, 8.0), (0.8, 16.0), (0.95, 8.0), (0.95, 16.0)]
    assert len(list(store.glob("profile-*/artifact.json"))) == 2, "one profile per context, the run's own used again"
    on = [row for row in rows if row["on_frontier"] == "True"]
    assert on and all(bool(row[name]) == (row in on) for row in rows for name in ("distilled_kl", "measured_kl"))
    children = {row["choices"] for row in on}
    assert done.stderr.count("[heldout]") >= len(children) and len(list(store.glob("heldout-*/artifact.json"))) == len(children)
    again = run(words)
    assert again.returncode == 0 and "[sweep] already there" in again.stderr and "[gkd]" not in again.stderr


def test_the_script_knows_its_verbs():
    listed = subprocess.run([sys.executable, "-m", "jobs.cli", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert listed.returncode == 0 and "compress" in listed.stdout and "serve-child" in listed.stdout
    wrong = subprocess.run([sys.executable, "-m", "jobs.cli", "compres"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert wrong.returncode == 2 and "did you mean 'compress'?" in wrong.stderr
