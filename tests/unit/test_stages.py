"""Stages as a graph: their order, what identifies them, what would run and why; a stage is added as one file."""

import json
import shutil
import threading
from dataclasses import replace

import pytest
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from small_models import save_parent
from small_runs import make_run, save_parent_with_text

import jobs.run
import jobs.stages
from jobs.endings import handled
from jobs.run import NotDone, Parent, Stage, in_order, stages
from jobs.status import Records, differences, rows
from puzzle_ray.config import load
from puzzle_ray.data.splits import load_tokens
from puzzle_ray.distill.text import check_enough
from puzzle_ray.errors import ConfigError, DataError, ProfileError
from puzzle_ray.pipeline import compress


@pytest.fixture(scope="module")
def parent_with_text(tmp_path_factory):
    return save_parent_with_text(tmp_path_factory.mktemp("parent"))


def test_every_stage_comes_behind_what_it_needs():
    order = [stage.name for stage in in_order(stages(), load("tiny"))]
    assert set(order) == stages().keys() and len(order) == 12
    for stage in stages().values():
        assert all(order.index(needed) < order.index(stage.name) for needed in (*stage.inputs, *stage.reads))
    for name in ("report", "evaluation", "architecture"):
        order = [stage.name for stage in in_order([name], load("tiny"))]
        assert order.index("tokens") < order.index("profile") < order.index("library"), "the budget is tried first"
    assert [stage.name for stage in in_order(["scores"], load(overrides=("parent=x",)))] == ["tokens", "library", "scores"]


def test_what_the_tiny_parent_cannot_read_is_said_before_its_text_is_tokenised(parent_with_text, tmp_path):
    """Other parents are looked at before any work; this one is not there then."""
    asked = make_run(parent_with_text, tmp_path, "evaluate.prompt=" + "word " * 40)
    asked.config = asked.config.model_copy(update={"parent": "tiny"})
    asked.parent = Parent.at(str(parent_with_text[0]))
    (reader,) = [stage for stage in stages().values() if stage.name == "tokens"]
    assert "tiny_parent" in reader.reads
    with pytest.raises(ConfigError, match="evaluate.prompt do not fit the parent's 128 positions"):
        reader.foreseen(asked)


def test_too_little_text_for_the_library_is_said_before_the_profile(parent_with_text, tmp_path):
    run = make_run(parent_with_text, tmp_path, "library.validation_tokens=8192")
    for _ in range(2):  # also where the tokens are there already
        with pytest.raises(DataError, match="512 sequences for validation leave nothing to train on: there are "):
            run.done("architecture")
        assert sorted(path.name.partition("-")[0] for path in tmp_path.glob("*-*")) == ["tokens"]
        run = make_run(parent_with_text, tmp_path, "library.validation_tokens=8192")
    assert run.done("tokens").finished, "who asks for no library is not asked for its text"
    folder, text = map(str, parent_with_text)
    settings = {
        "data.sequence_length": 16,
        "library.validation_tokens": 8192,
        "profile.scenario": {"input_tokens": 16, "output_tokens": 4},
    }
    with pytest.raises(DataError, match="sequences for validation leave nothing"):
        compress(folder, data=text, store=str(tmp_path / "serial"), settings=settings)
    assert sorted(path.name.partition("-")[0] for path in (tmp_path / "serial").glob("*-*")) == ["tokens"]


@pytest.mark.parametrize("verb", ["evaluation", "architecture"])
def test_a_length_of_distillation_that_the_text_has_not_is_said_before_the_profile(parent_with_text, tmp_path, verb):
    """What only searches asks for it where candidates race."""
    stage = "gkd.stages=[{sequence_length: 128, tokens: 1280, micro_batch_tokens: 128}]"
    little = ("data.max_train_tokens=100", "library.validation_tokens=16", "library.micro_batch_tokens=16")
    run = make_run(parent_with_text, tmp_path, stage, *little, "search.race_rungs=2")
    with pytest.raises(ConfigError, match="gkd.stages: no sequence of 128 tokens: there are 96 tokens to train on"):
        run.done(verb)
    assert sorted(path.name.partition("-")[0] for path in tmp_path.glob("*-*")) == ["tokens"]
    train, library = load_tokens(run.content("tokens"))[0], run.config.library.model_copy(update={"calibration_tokens": 16})
    with pytest.raises(ConfigError, match="no sequence of 128 tokens"):  # as in one process
        check_enough(train, 0, library, run.config.gkd)


def test_a_key_changes_with_what_the_result_depends_on_and_with_nothing_else(parent_with_text, tmp_path):
    def keys(*settings):
        run = make_run(parent_with_text, tmp_path, *settings)
        run.done("tokens")  # keys depend on what of them is read
        return {name: run.artifact(name).key for name in ("tokens", "library", "profile", "scores", "architecture")}

    plain = keys()
    for setting, changed in (
        ("library.window=5", set()),
        ("cluster.num_shards=1", set()),
        ("library.checkpoint_every=7", set()),
        ("profile.num_profilers=2", set()),
        ("scoring.racing_stderr=0.5", set()),
        ("scoring.fisher_samples=3", set()),
        ("scoring.downstream_questions=9", set()),
        ("search.measure_tokens=64", set()),
        ("gkd.num_workers=2", set()),
        ("scoring.metric=lm_loss", {"architecture"}),
        ("cluster.cpus_per_trainer=2", {"library", "scores", "architecture"}),
        ("cluster.gpus_per_trainer=1", {"library", "scores", "architecture"}),
        ("cluster.gpus_per_shard=0.5", {"library", "scores", "architecture"}),
        ("space.ffn_multiple_of=3", set()),  # no variant here is a percentage
        ("data.heldout_fraction=0.2", {"tokens", "library", "scores", "architecture"}),  # what is held out is not trained on
        ("scoring.tokens=4096", {"scores", "architecture"}),
        ("search.limits.speedup=1.2", {"architecture"}),
        ("profile.repeats=7", {"profile", "architecture"}),
        ("seed=1", {"library", "scores", "architecture"}),
        ("data.max_train_tokens=320", {"tokens", "library", "scores", "architecture"}),
    ):
        found = keys(setting)
        assert {name for name in plain if plain[name] != found[name]} == changed, setting


def test_a_key_is_of_the_tokens_that_are_read_and_of_no_others(parent_with_text, tmp_path):
    """Held-out text of its own: whatever becomes of it, what was trained is found again."""
    heldout, other = tmp_path / "heldout.txt", tmp_path / "other.txt"
    heldout.write_text("".join(f"held out for line {n}, " for n in range(200)))
    other.write_text(heldout.read_text().replace("line", "word"))
    read = ("scoring.tokens=160", "evaluate.tokens=320", "search.measure_tokens=160", "search.candidates=2")
    watched = "gkd.heldout_tokens=160"  # the first tokens of those that pick

    def keys(*settings):
        run = make_run(parent_with_text, tmp_path / "store", *read, watched, f"data.heldout={heldout}", *settings)
        run.done("tokens")
        found = {name: run.artifact(name).key for name in ("tokens", "library", "scores", "architecture")}
        about = {name: dict(stages()[name].sources(run)) for name in ("gkd", "evaluation")}
        return found | {name: json.dumps(sources) for name, sources in about.items()}

    plain = keys()
    everything_read = {"tokens", "scores", "architecture", "evaluation"}
    for settings, changed in (
        (("data.max_heldout_tokens=1600",), {"tokens", "evaluation"}),  # the test is at the end
        (("data.heldout_fraction=0.2",), {"tokens"}),  # not used
        ((f"data.heldout={other}",), everything_read | {"gkd"}),
        (("scoring.tokens=320",), {"scores", "architecture", "gkd"}),  # those that pick begin behind it
        (("search.measure_tokens=320",), {"architecture"}),
        (("evaluate.tokens=160",), {"evaluation"}),
        (("data.max_train_tokens=320",), {"tokens", "library", "scores", "architecture", "gkd"}),
        (("data.sequence_length=32",), everything_read | {"library", "gkd"}),
    ):
        found = keys(*settings)
        assert {name for name in plain if plain[name] != found[name]} == changed, settings
    unwatched = "gkd.heldout_tokens=0"
    assert keys(unwatched)["gkd"] == keys(unwatched, f"data.heldout={other}", "scoring.tokens=320")["gkd"]


def test_what_depends_on_unfinished_content_says_so(parent_with_text, tmp_path):
    run = make_run(parent_with_text, tmp_path)
    for name in ("library", "scores"):
        with pytest.raises(NotDone) as missing:
            run.artifact(name)
        assert missing.value.stage == "tokens"
    run.done("tokens")
    with pytest.raises(NotDone) as missing:
        run.artifact("child")
    assert missing.value.stage == "architecture"


def finish(run, name):
    artifact = run.artifact(name)
    artifact.finish({})
    return artifact


def test_status_says_what_is_finished_what_would_run_and_why(parent_with_text, tmp_path):
    def status(*settings):
        return {row.stage: row for row in rows(make_run(parent_with_text, tmp_path, *settings))}

    empty = status()
    assert {row.state for row in empty.values()} == {"to do"} and not list(tmp_path.iterdir()), "nothing is written"
    assert empty["profile"].words == "no such stage in this store yet"
    assert empty["library"].words == empty["gkd"].words == "what it does depends on the result of tokens"
    assert empty["scores"].words == "what it does depends on the result of tokens"

    run = make_run(parent_with_text, tmp_path)
    run.done("tokens")
    assert status()["child"].words == "what it does depends on the result of architecture"
    for name in ("library", "profile", "scores"):
        finish(run, name)
    done = status()
    assert {name for name, row in done.items() if row.state == "finished"} == {"tokens", "library", "profile", "scores"}
    assert done["scores"].words == run.artifact("scores").url

    changed = status("scoring.tokens=4096")
    assert changed["library"].state == "finished" and changed["scores"].state == "to do"
    assert changed["scores"].words.startswith("changed: scoring.tokens 8192 -> 4096 (since ")
    library = status("library.learning_rate=0.5", "seed=3")
    assert "library.learning_rate 0.001 -> 0.5" in library["library"].words and "seed 0 -> 3" in library["library"].words
    assert library["scores"].words == "reads library, which would run"
    with_more_text = make_run(parent_with_text, tmp_path, "data.max_train_tokens=320")
    assert {row.stage: row.state for row in rows(with_more_text)}["tokens"] == "to do"
    with_more_text.done("tokens")
    assert status("data.max_train_tokens=320")["library"].words.startswith("changed: input train tokens (since ")


def test_status_explains_nothing_by_an_artifact_of_another_parent(parent_with_text, tmp_path, monkeypatch):
    other = save_parent(tmp_path / "other", seed=7, vocab_size=VOCAB_SIZE + 7)
    byte_tokenizer().save_pretrained(other)
    first, store = make_run(parent_with_text, tmp_path / "store"), tmp_path / "store"
    for name in ("tokens", "library", "scores", "profile"):
        first.done("tokens") if name == "tokens" else finish(first, name)
    finish(make_run(parent_with_text, store, "scoring.tokens=4096"), "scores")
    second = make_run((other, parent_with_text[1]), store, "scoring.tokens=2048")
    second.done("tokens")
    words = {row.stage: row.words for row in rows(second)}
    assert words["library"] == words["scores"] == words["profile"] == "no such stage of this parent in this store yet"
    finish(make_run((other, parent_with_text[1]), store, "library.learning_rate=0.5"), "library")
    finish(make_run((other, parent_with_text[1]), store, "library.learning_rate=0.5", "scoring.tokens=1024"), "scores")
    words = {row.stage: row.words for row in rows(second)}
    assert words["library"].startswith("changed: library.learning_rate 0.5 -> 0.001 (since ")
    assert words["scores"].startswith("reads library, which would run; changed: scoring.tokens 1024 -> 2048 (since ")
    reads = []
    monkeypatch.setattr(Records, "_read", lambda self, name, read=Records._read: reads.append(name) or read(self, name))
    rows(second)
    assert len(reads) == len(set(reads)) >= 6, "each once, though several stages look along them: a store may have thousands"
    shutil.rmtree(first.artifact("library").url)  # whose scores those of the first parent are is not known any more
    assert {row.stage: row.words for row in rows(second)}["scores"] == words["scores"]


def test_a_stage_that_was_begun_is_told_apart(parent_with_text, tmp_path):
    run = make_run(parent_with_text, tmp_path)
    run.done("tokens")
    run.artifact("library").write("layer_000.attention.noop.safetensors", b"x")
    row = next(row for row in rows(run) if row.stage == "library")
    assert row.state == "begun" and row.words.startswith("not finished yet: ")


def test_differences_name_settings_and_inputs(parent_with_text, tmp_path):
    run = make_run(parent_with_text, tmp_path)
    run.done("tokens")
    artifact = run.artifact("scores")
    record = {"settings": json.loads(json.dumps(artifact.settings)), "inputs": dict(artifact.inputs)}
    assert list(differences(record, artifact)) == []
    record["settings"]["scoring"]["racing"] = True
    record["inputs"]["library"] = "another"
    assert list(differences(record, artifact)) == ["scoring.racing true -> false", "input library"]
    profile = run.artifact("profile")
    inputs = dict(profile.inputs) | {"target": "an abacus"}
    (words,) = differences({"settings": json.loads(json.dumps(profile.settings)), "inputs": inputs}, profile)
    assert words == f"input target an abacus -> {run.target.device}"


COUNT = """
from jobs.run import Stage


def work(run, artifact):
    artifact.finish({"words": 7})


STAGE = Stage("counted_here", work, inputs=("tokens",), said=lambda facts: f"{facts['words']} words")
"""


@pytest.fixture
def one_more_stage(tmp_path, monkeypatch):
    """A stage of one file, in a folder beside those of the package."""
    folder = tmp_path / "more_stages"
    folder.mkdir()
    (folder / "counted_here.py").write_text(COUNT)
    monkeypatch.setattr(jobs.stages, "__path__", [*jobs.stages.__path__, str(folder)])
    stages.cache_clear()
    yield
    stages.cache_clear()


def test_a_stage_is_added_as_one_file(one_more_stage, parent_with_text, tmp_path, capsys):
    run = make_run(parent_with_text, tmp_path / "store")
    assert "counted_here" in {row.stage for row in rows(run)}
    artifact = run.done("counted_here")
    assert artifact.facts() == {"words": 7} and artifact.inputs == {"tokens": run.artifact("tokens").key}
    assert "  7 words\n" in capsys.readouterr().err
    assert make_run(parent_with_text, tmp_path / "store").done("counted_here").key == artifact.key
    assert "[counted_here] already there" in capsys.readouterr().err


@pytest.fixture
def two_stages(monkeypatch):
    """`slow` may run beside `other`; `both` reads them."""

    def install(slow, other):
        found = {
            "slow": Stage("slow", slow, beside=lambda run: True),
            "other": Stage("other", other),
            "both": Stage("both", lambda run, artifact: artifact.finish({}), inputs=("slow", "other")),
        }
        monkeypatch.setattr(jobs.run, "stages", lambda: found)

    return install


def test_independent_stages_run_at_the_same_time(two_stages, parent_with_text, tmp_path):
    met = threading.Barrier(2, timeout=240)  # passed only where both are at work

    def work(run, artifact):
        run.placed.set()
        met.wait()
        artifact.finish({})

    two_stages(work, work)
    run = make_run(parent_with_text, tmp_path)
    assert run.done("both").finished and run.artifact("slow").finished and run.artifact("other").finished


def test_a_stage_that_fails_in_the_background_ends_the_run_at_once(two_stages, parent_with_text, tmp_path):
    never = threading.Event()

    def fails(run, artifact):
        run.placed.set()
        assert at_work.wait(240)
        raise ProfileError("profile", "the device is gone")

    def works(run, artifact):
        at_work.set()
        assert not never.wait(300), "it would go on for long"

    at_work = threading.Event()
    two_stages(fails, works)
    run = make_run(parent_with_text, tmp_path)
    with (
        handled(),
        pytest.raises(ProfileError, match="the device is gone"),
    ):  # a shell may have SIGINT ignored; a command does not
        run.done("both")
    assert not run.artifact("other").finished


def test_a_finished_stage_is_not_looked_at_twice_in_a_run(parent_with_text, tmp_path, capsys):
    run = make_run(parent_with_text, tmp_path)
    run.done("tokens")
    run.done("tokens")
    assert capsys.readouterr().err.count("[tokens]") == 1
    other = replace(stages()["tokens"], name="tokens")
    assert other.name in run.seconds
