"""What identifies a profile, and what a plug-in's source does to keys."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from small_runs import make_run, save_parent_with_text

from jobs.run import NotDone
from jobs.stages import architecture, profile
from jobs.status import rows
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.errors import ClusterError, ConfigError, Infeasible, ProfileError
from puzzle_ray.plugins import plugin_source
from puzzle_ray.process import num_cores
from puzzle_ray.profiling.engine import Target, depends_on_node, target_here
from puzzle_ray.profiling.machine import cpu_name
from puzzle_ray.profiling.measure import profile_serially
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.progress import Quiet
from puzzle_ray.version import torch_series

ENGINE = """
from puzzle_ray.profiling.engines.torch_engine import TorchEngine


class StandIn(TorchEngine):
    name, device = "stand-in", "GPU A"

    def version(self):
        return "stand-in 1"

    def device_name(self, use_gpu=False):
        return self.device


ENGINE = StandIn()
"""
VARIANT = """
class Thin:
    name, kinds, trainable, needs = "thin", ("ffn",), True, ()

    def resolve(self, argument, kind, config, multiple_of):
        return argument

    def reshape(self, layer, argument, kind, descriptor, config):
        raise NotImplementedError

    def initialise(self, layer, parent, argument, kind, descriptor, statistics):
        raise NotImplementedError


VARIANT = Thin()
"""
SEARCHER = """
class Lazy:
    name = "lazy"

    def solve(self, problem, options):
        raise NotImplementedError


SEARCHER = Lazy()
"""
PROFILE = {"scenario": {"batch_size": 1, "input_tokens": 6, "output_tokens": 3}, "repeats": 2, "stack": 1}


@pytest.fixture(scope="module")
def parent_with_text(tmp_path_factory):
    return save_parent_with_text(tmp_path_factory.mktemp("parent"))


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """The folder of an importable package `ours` with an engine, a variant and a searcher."""
    folder = tmp_path / "ours"
    folder.mkdir()
    for name, text in (("__init__", ""), ("engine", ENGINE), ("thin", VARIANT), ("wide", VARIANT), ("lazy", SEARCHER)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "ours"]:
        del sys.modules[name]


def test_a_cpu_is_named_with_the_threads_that_a_profiler_computes_with():
    config = ProfileConfig(**PROFILE)
    before = torch.get_num_threads()
    assert target_here(config, 3).device == f"{cpu_name()}, 3 threads" and torch.get_num_threads() == before
    torch.set_num_threads(2)  # of the driver, at this moment
    assert target_here(config, 3) == Target(f"{cpu_name()}, 3 threads", f"torch {torch.__version__}, {_transformers()}")


def _transformers():
    import transformers

    return f"transformers {transformers.__version__}"


def test_the_drivers_environment_does_not_count(parent_with_text, tmp_path):
    folder, text = parent_with_text
    code = (
        "from small_runs import make_run; from pathlib import Path; import sys\n"
        "run = make_run((Path(sys.argv[1]), Path(sys.argv[2])), Path(sys.argv[3]))\n"
        "print(run.target.device, run.artifact('profile').key)"
    )
    words = [sys.executable, "-c", code, str(folder), str(text), str(tmp_path)]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600, check=True)
    here = make_run(parent_with_text, tmp_path)
    assert here.target.device.endswith(f"{num_cores()} threads")
    assert done.stdout.split() == f"{here.target.device} {here.artifact('profile').key}".split()


def test_two_devices_never_share_a_profile(ours, parent_with_text, tmp_path):
    def profile():
        run = make_run(parent_with_text, tmp_path / "store", "profile.engine=ours.engine:ENGINE", "profile.num_gpus=1")
        return run.artifact("profile")

    engine = importlib.import_module("ours.engine").ENGINE
    first = profile()
    assert first.key == profile().key and first.inputs["target"] == "GPU A" and first.inputs["engine"] == "stand-in 1"
    engine.device = "GPU B"
    second = profile()
    engine.version = lambda: "stand-in 2"
    assert len({first.key, second.key, profile().key}) == 3


def test_a_result_of_another_device_or_version_is_an_error_in_one_line(ours, parent_with_text, tmp_path):
    run = make_run(parent_with_text, tmp_path / "store")
    config = ProfileConfig(engine="ours.engine:ENGINE", **PROFILE)
    wanted, artifact = target_here(config, 1), run.store.artifact("profile", {}, {})
    arguments = (run.parent.model_config, run.whole_space, config, artifact, Quiet())
    engine = importlib.import_module("ours.engine").ENGINE
    engine.device = "GPU B"
    with pytest.raises(ProfileError) as error:
        profile_serially(*arguments, wanted)
    assert "the profile is of stand-in 1 on GPU A, and items/" in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).count("was measured by stand-in 1 on GPU B; ") == 1
    assert artifact.names() == [], "nothing is mixed"
    engine.device = "GPU A"
    assert profile_serially(*arguments, wanted).device == "GPU A"


def test_estimates_need_no_node_but_for_the_cpu_at_hand(monkeypatch, parent_with_text, tmp_path):
    assert depends_on_node(ProfileConfig(**PROFILE)) and depends_on_node(ProfileConfig(engine="roofline", device="cpu"))
    figures = {"name": "ours", "tflops": {"float32": 1}, "bandwidth_gb_s": 100, "memory_mib": 1000}
    assert not depends_on_node(ProfileConfig(engine="roofline", device=figures))
    monkeypatch.setattr("ray.is_initialized", lambda: True)  # it would be asked
    run = make_run(parent_with_text, tmp_path, "profile={engine: roofline, device: H100, dtype: bfloat16}")
    assert "H100" in run.target.device and run.artifact("profile").inputs["target"] == run.target.device


def test_the_node_is_asked_once_in_a_run(monkeypatch, parent_with_text, tmp_path):
    asked = []
    answer = Target("GPU A", "torch 1")
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("actors.profiler.ask_target", lambda config, cluster: asked.append(config) or answer)
    run = make_run(parent_with_text, tmp_path, "search.sweep={speedup: [1.1], input_tokens: [8, 16]}")
    assert run.artifact("profile").inputs["target"] == "GPU A"
    others = [run.in_context(tokens, 4) for tokens in (8, 16)]
    assert len({other.artifact("profile").key for other in others}) == 2 and len(asked) == 1


def test_status_says_that_the_device_does_not_answer(monkeypatch, parent_with_text, tmp_path):
    asked = []

    def silent(config, cluster):
        asked.append(config)
        raise ClusterError("cluster", "no profiler has room")

    make_run(parent_with_text, tmp_path).done("tokens")
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("actors.profiler.ask_target", silent)
    found = {row.stage: row for row in rows(make_run(parent_with_text, tmp_path))}
    assert found["profile"].words == "which device measures is not known: cluster: no profiler has room"
    assert found["tokens"].state == "finished" and found["library"].words == found["scores"].words
    assert found["architecture"].words == "what it does depends on the result of profile" and len(asked) == 1
    assert {row.state for name, row in found.items() if name != "tokens"} == {"to do"}


def test_what_says_where_to_measure_makes_no_other_profile(parent_with_text, tmp_path):
    """The key has the device itself. How far `auto` would look counts only where it looks."""
    key = make_run(parent_with_text, tmp_path).artifact("profile").key
    for same in ("label_selector={a: b}", "resources={x: 0.001}", "max_batch_size=128", "num_profilers=3", "memory_mib=999"):
        assert make_run(parent_with_text, tmp_path, f"profile.{same}").artifact("profile").key == key, same
    for other in ("repeats=7", "stack=3", "batch_sizes=[1, 2]"):
        assert make_run(parent_with_text, tmp_path, f"profile.{other}").artifact("profile").key != key, other
    auto = [ProfileConfig(batch_sizes="auto", max_batch_size=size).identity() for size in (128, 256)]
    assert auto[0] != auto[1]


def test_the_devices_memory_bounds_the_search_and_makes_no_other_profile(parent_with_text, tmp_path):
    """Measuring again because of a figure that no measurement reads would waste the target's time."""
    found = {}
    for name, words in {"unknown": (), "large": ("profile.memory_mib=999",), "small": ("profile.memory_mib=0.12",)}.items():
        run = make_run(parent_with_text, tmp_path, "search.limits={params_fraction: 0.99}", *words)
        found[name] = run, architecture.settings(run), profile.settings(run)
    run = found["unknown"][0]
    arguments = (run.parent.model_config, run.whole_space, run.profile_config, run.artifact("profile"), Quiet())
    profile_serially(*arguments)
    for other, settings, of_profile in list(found.values())[1:]:
        assert of_profile == found["unknown"][2] and settings != found["unknown"][1]
        assert profile.read(other).details["memory_mib"] == other.config.profile.memory_mib
    assert "memory_mib" not in profile.read(run).details
    profile.check_budget(found["large"][0])
    with pytest.raises(Infeasible, match="memory"):
        profile.check_budget(found["small"][0])


def keys_of(run):
    run.done("tokens")
    found = {name: run.artifact(name).key for name in ("tokens", "library", "profile", "scores", "architecture")}
    try:
        found["sweep"] = run.artifact("sweep").key
    except NotDone as missing:
        raise AssertionError(missing.stage) from None
    return found


def test_a_changed_plugin_changes_the_keys_of_what_it_makes(ours, parent_with_text, tmp_path):
    settings = (
        *("space.ffn=[parent, 'ours.thin:VARIANT:4', noop]", "search.searcher=ours.lazy:SEARCHER"),
        "profile.engine=ours.engine:ENGINE",
    )

    def keys():
        return keys_of(make_run(parent_with_text, tmp_path / "store", *settings))

    plain = keys()
    behind = {"architecture", "sweep"}
    for file, changed in (
        ("wide.py", set()),  # another plug-in
        ("lazy.py", behind),
        ("engine.py", {"profile", *behind}),
        ("thin.py", {"library", "profile", "scores", *behind}),
    ):
        text = (ours / file).read_text()
        (ours / file).write_text(text + "\n# changed\n")
        found = keys()
        assert {name for name in plain if plain[name] != found[name]} == changed, file
        (ours / file).write_text(text)
    assert keys() == plain


def test_what_of_a_plugin_is_looked_at(ours, tmp_path):
    (ours / "offers.py").write_text("from ours.thin import VARIANT\n")
    variant = importlib.import_module("ours.offers").VARIANT

    def source(name="ours.offers:VARIANT", module_name=""):
        return plugin_source(name, variant, where="space.ffn", module_name=module_name)

    before = source()
    assert list(before) == ["plug-in ours.offers:VARIANT"]
    (ours / "thin.py").write_text(VARIANT + "\n# changed\n")
    assert source() != before, "where the class is"
    by_entry_point = source("thin", "ours.offers")
    assert by_entry_point == {"plug-in thin": source()["plug-in ours.offers:VARIANT"]}
    assert source("thin") != by_entry_point, "a file put beside ours: the class alone is known"


def test_our_own_plugins_have_no_source_in_a_key(parent_with_text, tmp_path):
    run = make_run(
        *(parent_with_text, tmp_path, "profile.engine=puzzle_ray.profiling.engines.torch_engine:ENGINE"),
        "search.searcher=puzzle_ray.search.searchers.greedy:SEARCHER",
    )
    run.done("tokens")
    names = {name for stage in ("library", "profile", "scores", "architecture") for name in run.artifact(stage).inputs}
    assert not [name for name in names if "plug-in" in name]


def test_a_plugin_without_a_file_is_refused(monkeypatch):
    from types import ModuleType

    module = ModuleType("of_no.file")
    monkeypatch.setitem(sys.modules, "of_no.file", module)
    with pytest.raises(ConfigError, match="space.ffn: the module of_no.file of 'of_no.file:THIN' has no file"):
        plugin_source("of_no.file:THIN", object(), where="space.ffn")


def test_torchs_version_and_threads_of_trainers_are_in_keys(parent_with_text, tmp_path, monkeypatch):
    assert torch.__version__.startswith(f"{torch_series()}.")
    run = make_run(parent_with_text, tmp_path)
    run.done("tokens")
    settings = json.loads(json.dumps(run.artifact("library").settings))
    assert settings["torch"] == torch_series() == run.artifact("scores").settings["torch"]
    assert settings["cluster"] == {"cpus_per_trainer": 1, "trainers_on_gpu": False, "shards_on_gpu": False}
    on_gpus = ClusterConfig(cpus_per_trainer=8, gpus_per_trainer=1, gpus_per_shard=0.5)
    assert on_gpus.library_identity() == {"trainers_on_gpu": True, "shards_on_gpu": True}
    assert on_gpus.in_one_process().library_identity()["cpus_per_trainer"] == 8
