"""The command line: one application, a sub-command for every verb, and errors that are one line."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import jobs
from jobs import app
from puzzle_ray.plugins import declared
from puzzle_ray.version import __version__

ROOT = Path(__file__).parents[2]
VERBS = {verb.name: verb for verb in declared("jobs", "VERB")}


def said(capsys):
    out = capsys.readouterr()
    return out.out, out.err


def test_help_lists_every_verb_in_its_group(capsys):
    assert app.run(["--help"]) == 0
    out, _ = said(capsys)
    assert all(name in out for name in VERBS) and all(verb.group in out for verb in VERBS.values())
    assert "inputs" not in out and "session" not in out, "helpers are no verbs"


def test_every_verb_is_a_module_of_its_name_and_explains_its_options(capsys):
    modules = {info.name for info in pkgutil.iter_modules(jobs.__path__)}
    for name, verb in VERBS.items():
        assert name.replace("-", "_") in modules
        assert app.run([name, "--help"]) == 0
        out, _ = said(capsys)
        assert "--debug" in out and (verb.call.__doc__ or "").strip().split()[0] in out


@pytest.mark.parametrize("words", [[], ["store"]])
def test_without_a_verb_the_help_is_shown_and_no_error(words, capsys):
    assert app.run(words) == 2
    out, err = said(capsys)
    assert "Usage: puzzle-ray" in out and err == ""


def test_config_files_stand_on_top_of_each_other(tmp_path, capsys):
    for name, text in (("a.yaml", "seed: 5\nlibrary: {tokens: 4096}\n"), ("b.yaml", "seed: 6\n")):
        (tmp_path / name).write_text(text)
    assert app.run(["config", "--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]) == 0
    shown = yaml.safe_load(said(capsys)[0])
    assert (shown["seed"], shown["library"]["tokens"]) == (6, 4096)
    assert app.run(["config", "--config", str(tmp_path / "none.yaml"), "--config", str(tmp_path / "b.yaml")]) == 2
    assert "there is no file" in said(capsys)[1]


def test_a_verb_runs_as_a_module_too():
    done = subprocess.run([sys.executable, "-m", "jobs.status", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "puzzle-ray status" in done.stdout


def test_the_version(capsys):
    assert app.run(["--version"]) == 0
    assert said(capsys)[0] == f"{__version__}\n"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["compres"], "Did you mean 'compress'?"),
        (["inputs"], "No such command 'inputs'"),
        (["compress", "--nope"], "No such option: --nope"),
        (["serve-child", "--child", "x", "--port", "no"], "--port"),
        (["compress", "--recipe", "tinny"], "did you mean 'tiny'"),
        (["compress", "--config", "nowhere.yaml"], "there is no file 'nowhere.yaml'"),
    ],
)
def test_what_is_wrong_on_a_command_line_is_one_line(words, wanted, capsys):
    assert app.run(words) == 2
    out, err = said(capsys)
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and wanted in err


def test_a_store_that_may_not_be_read_is_one_line(monkeypatch, tmp_path, capsys):
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_PROFILE",
        "FSSPEC_S3_KEY",
        "FSSPEC_S3_SECRET",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert app.run(["status", "--recipe", "tiny", "--store", "s3://bucket/store"]) == 2
    out, err = said(capsys)
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: store: 's3://bucket/store' cannot be read (NoCredentialsError")


@pytest.mark.parametrize("parent", ["x" * 5000, "~nobody-of-that-name/model", "a\0b"])
def test_a_parent_that_can_be_no_folder_is_one_line(parent, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("some text\n")
    assert app.run(["status", "--parent", parent, "--data", str(text), "--store", str(tmp_path / "store")]) == 2
    out, err = said(capsys)
    assert out == "" and err.startswith("error: parent: ") and err.count("\n") == 1


@pytest.fixture
def broken(monkeypatch):
    def raises(*_, **__):
        raise KeyError("a fault of ours")

    monkeypatch.setattr("jobs.status.rows", raises)
    monkeypatch.delenv("PUZZLE_RAY_DEBUG", raising=False)


def test_a_fault_of_ours_is_one_line_and_its_traceback_is_in_a_file(broken, capsys):
    assert app.run(["status", "--recipe", "tiny"]) == 1
    _, err = said(capsys)
    assert err.startswith("error: KeyError: 'a fault of ours'; the traceback is in ") and err.count("\n") == 1
    log = Path(err.strip().rpartition(" ")[2])
    assert "Traceback" in log.read_text() and "raises" in log.read_text()
    log.unlink()


def test_debug_shows_the_traceback(broken, capsys, monkeypatch):
    monkeypatch.setenv("PUZZLE_RAY_DEBUG", "")  # set by the option, taken back behind this test
    assert app.run(["status", "--recipe", "tiny", "--debug"]) == 1
    _, err = said(capsys)
    assert "Traceback" in err and err.endswith("error: KeyError: 'a fault of ours'\n")


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.status.rows", interrupted)
    assert app.run(["status", "--recipe", "tiny"]) == 130
    assert said(capsys)[1] == "interrupted; the same command continues\n"
