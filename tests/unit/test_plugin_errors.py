"""What a user's own variant, searcher or engine raises is one line that names its file and line."""

from __future__ import annotations

import importlib
import pickle
import sys

import pytest
import torch
from small_runs import make_run, save_parent_with_text

from jobs import app
from puzzle_ray.errors import ConfigError, Infeasible, PluginError
from puzzle_ray.plugins import load_plugin
from puzzle_ray.profiling.engine import engine_of, find_engine
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.search.searcher import find_searcher
from puzzle_ray.variants import base
from puzzle_ray.variants.base import find_variant

LOW_RANK = """
from puzzle_ray.variants.ffn import VARIANT as FFN


class LowRank:
    name, kinds, trainable = "low_rank", ("ffn",), True

    def resolve(self, argument, kind, config, multiple_of):
        if argument == "resolve":
            raise KeyError("rank")
        return argument

    def reshape(self, layer, argument, kind, descriptor, config):
        if argument == "reshape":
            raise RuntimeError("mat1 and mat2\\ncannot be multiplied")

    def initialise(self, *arguments):
        helper()


def helper():
    raise ValueError("no rank")


VARIANT = LowRank()
NOTHING = object()
"""
OTHERS = """
from puzzle_ray.errors import Infeasible


class Broken:
    name, shift = "broken", 1

    def solve(self, problem, options):
        if options is None:
            raise Infeasible("params", "<=", 1.0, 2.0)
        return [][self.shift]

    def version(self):
        return "1"

    def device_name(self, use_gpu=False):
        return "none"

    def facts(self, use_gpu=False):
        return {}

    def configured(self, config):
        return Broken()

    def build(self, *arguments):
        raise torch_error() if arguments else OSError()


def torch_error():
    import torch

    return torch.OutOfMemoryError("full")


BROKEN = Broken()
"""


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """A package `our_variants` of a user's own; gone after the test."""
    package = tmp_path / "our_variants"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "low_rank.py").write_text(LOW_RANK)
    (package / "others.py").write_text(OTHERS)
    (package / "at_import.py").write_text("import math\n\nWIDTH = 1 / 0\n")
    (package / "no_python.py").write_text("VARIANT = (\n")
    (package / "needs.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "our_variants"]:
        del sys.modules[name]


def line_of(package, file, text):
    return (package / file).read_text().splitlines().index(text) + 1


IMPORTS = {
    "our_variants.at_import:V": ("ZeroDivisionError: division by zero (our_variants/at_import.py:3)"),
    "our_variants.no_python:V": ("SyntaxError: '(' was never closed (no_python.py, line 1) (our_variants/no_python.py:1)"),
    "our_variants.needs:V": ("ModuleNotFoundError: No module named 'a_package_that_is_not_there' (our_variants/needs.py:1)"),
}


@pytest.mark.parametrize("path", IMPORTS)
def test_at_import(ours, path):
    with pytest.raises(PluginError) as caught:
        find_variant(path, "ffn")
    assert str(caught.value) == f"variant {path} failed in import: {IMPORTS[path]}"


@pytest.mark.parametrize("path", ["our_variants.nowhere:V", "nowhere.at_all:V", "our_variants.low_rank:NOWHERE", ".:V", "a..b:V"])
def test_a_path_that_leads_nowhere_is_a_wrong_setting(ours, path):
    with pytest.raises(ConfigError, match="cannot be imported .* write package.module:ATTRIBUTE"):
        find_variant(path, "ffn")


def test_in_a_function(ours):
    variant, _ = find_variant("our_variants.low_rank:VARIANT", "ffn")
    with pytest.raises(PluginError) as caught:
        variant.initialise(1, 2)
    line = line_of(ours, "low_rank.py", '    raise ValueError("no rank")')
    what = "variant our_variants.low_rank:VARIANT failed in initialise: ValueError: no rank"
    assert str(caught.value) == f"{what} (our_variants/low_rank.py:{line})"
    assert "Traceback" in caught.value.args[4] and "in helper" in caught.value.args[4]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(PluginError, match=r"reshape: RuntimeError: mat1 and mat2 cannot be multiplied \(our_"):
        variant.reshape(None, "reshape", "ffn", None, None)


def test_an_entry_point(ours, monkeypatch):
    from importlib.metadata import EntryPoint

    monkeypatch.setattr(
        base, "_plugins", lambda: {"low_rank": EntryPoint("low_rank", "our_variants.at_import:V", base.ENTRY_POINTS)}
    )
    with pytest.raises(PluginError, match="variant our_variants.at_import:V failed in import: ZeroDivisionError"):
        find_variant("low_rank", "ffn")


def test_a_searcher_and_an_engine(ours):
    searcher = find_searcher("our_variants.others:BROKEN")
    with pytest.raises(PluginError, match=r"searcher our_variants.others:BROKEN failed in solve: IndexError.*others.py:\d+\)"):
        searcher.solve(None, 1)
    with pytest.raises(Infeasible):
        searcher.solve(None, None)
    engine = engine_of(ProfileConfig(engine="our_variants.others:BROKEN"))
    assert engine.name == "broken" and not hasattr(engine, "time_stacks")
    with pytest.raises(PluginError, match="engine our_variants.others:BROKEN failed in build: OSError \\(our"):
        engine.build()
    with pytest.raises(torch.OutOfMemoryError):
        engine.build(1)
    for find, words in ((find_searcher, "is no searcher: it lacks solve"), (find_engine, "is no engine: it lacks name, version")):
        with pytest.raises(ConfigError, match=words):
            find("our_variants.low_rank:NOTHING")


def test_it_travels_to_other_processes(ours):
    loaded = load_plugin("our_variants.low_rank:VARIANT", "space.ffn", "variant")
    again = pickle.loads(pickle.dumps(loaded))
    with pytest.raises(PluginError, match="variant our_variants.low_rank:VARIANT failed in initialise"):
        again.initialise()


def test_a_command_says_it_in_one_line_and_names_the_traceback(ours, tmp_path, capsys):
    folder = tmp_path / "parent"
    folder.mkdir()
    run = make_run(save_parent_with_text(folder), tmp_path / "store")
    words = [f"parent={run.config.parent}", f"data.train={run.config.data.train}", "data.sequence_length=16"]
    words += ["space.ffn=[parent,'our_variants.low_rank:VARIANT:resolve']"]
    capsys.readouterr()
    assert app.run(["status", "--store", str(tmp_path / "store"), *(w for s in words for w in ("--set", s))]) == 2
    err = capsys.readouterr().err
    assert err.startswith(
        "error: variant our_variants.low_rank:VARIANT failed in resolve: KeyError: 'rank' (our_variants/low_rank.py:"
    )
    assert err.count("\n") == 1
    log = err.strip().rpartition(" ")[2]
    with open(log) as file:
        assert "Traceback" in file.read()


def test_an_error_of_a_ray_worker_is_told_as_the_plugin_s(capsys, monkeypatch):
    """Ray raises the worker's error as a class that is both, whose words are the worker's traceback."""
    own = PluginError("variant ours:V", "reshape", "ValueError: no", "ours.py:3", "Traceback of the worker")

    class Both(PluginError):
        cause = own

        def __str__(self):
            return "ray::Trainer.step()\nTraceback\n  lines"

    def raises(*_, **__):
        raise Both(*own.args)

    monkeypatch.setattr("jobs.status.rows", raises)
    assert app.run(["status", "--recipe", "tiny"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: variant ours:V failed in reshape: ValueError: no (ours.py:3); the traceback is in ")
    with open(err.strip().rpartition(" ")[2]) as file:
        assert file.read().endswith("Traceback of the worker")
