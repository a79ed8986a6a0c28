"""One file is one plug-in: each file in `tests/added_plugins` is put beside the package's own, and used."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from search_inputs import PROFILE, SCORES, SPACE
from small_models import save_parent, tiny_config

from puzzle_ray.artifacts import FIXED, LayerChoice, LayerSpace, Scenario, SearchSpace
from puzzle_ray.calibration import Statistics
from puzzle_ray.errors import ConfigError, ParentError
from puzzle_ray.families import registry
from puzzle_ray.families.registry import families
from puzzle_ray.models.blocks import load_stack, subblock_state, swapped
from puzzle_ray.models.child import assemble, load_model, read_config, save_child
from puzzle_ray.models.describe import describe
from puzzle_ray.plugins import did_you_mean
from puzzle_ray.profiling import engine as engines
from puzzle_ray.profiling.measure import profile_serially
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.progress import Quiet
from puzzle_ray.scoring.serial import score_serially
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.search import searcher as searchers
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.tables import Tables
from puzzle_ray.store import Store
from puzzle_ray.variants import base as variants
from puzzle_ray.variants.base import find_variant
from puzzle_ray.variants.space import search_space

ADDED = Path(__file__).parents[1] / "added_plugins"
IDS = torch.arange(32).remainder(96).reshape(2, 16)


@pytest.fixture
def added(monkeypatch):
    """Call it with a package and the module that looks through it: the package has one file more until the test ends."""
    looked_through = []

    def forget():
        for module in looked_through:
            for function in vars(module).values():
                if hasattr(function, "cache_clear"):
                    function.cache_clear()

    def add(package: str, module) -> None:
        folder, own = ADDED / package.rpartition(".")[2], importlib.import_module(package)
        monkeypatch.setattr(own, "__path__", [*own.__path__, str(folder)])
        for file in folder.glob("*.py"):
            name = f"{package}.{file.stem}"
            monkeypatch.setitem(sys.modules, name, None)  # so that it is taken out again in the end
            monkeypatch.delitem(sys.modules, name)
            monkeypatch.setattr(own, file.stem, None, raising=False)
        looked_through.append(module)
        forget()

    yield add
    monkeypatch.undo()
    forget()


@torch.no_grad()
def test_a_family(added, tmp_path):
    folder = save_parent(tmp_path / "parent", "starcoder2")
    config = read_config(folder)
    with pytest.raises(ParentError, match="family 'starcoder2' is not supported: layer 0 has no linear mlp.gate_proj"):
        describe(config)
    added("puzzle_ray.families", registry)
    descriptor = describe(config)
    assert families()["starcoder2"] is descriptor and descriptor.ffn_up == "c_fc"
    stack = load_stack(folder, descriptor, config, 0, 3, torch.float32)
    hidden = stack.embed(IDS)
    for index in range(3):
        hidden = stack.run_layer(stack.layer(index), index, hidden)
    logits = load_model(folder)(IDS).logits
    assert torch.equal(stack.logits(hidden), logits)
    assert torch.equal(assemble(folder, config, [LayerChoice()] * 3, {}, torch.float32)(IDS).logits, logits)
    narrow = swapped(stack.layer(0), LayerChoice("gqa:1", "ffn:24"), descriptor, config)
    assert narrow.self_attn.k_proj.bias.shape == (8,) and narrow.mlp.c_fc.weight.shape == (24, 32)


@torch.no_grad()
def test_a_variant(added, parent_folder, tmp_path):
    config = read_config(parent_folder)
    with pytest.raises(ConfigError, match="unknown variant 'bottleneck'"):
        search_space(config, (), ("bottleneck:4",), 8)
    added("puzzle_ray.variants", variants)
    layer_space = search_space(config, (), ("bottleneck:4", "bottleneck:32"), 8).layers[0]
    assert layer_space.ffn == ("parent", "bottleneck:4"), "as wide as the hidden states it would be no smaller"
    stack, choice = load_stack(parent_folder, describe(config), config, 0, 3, torch.float32), LayerChoice(ffn="bottleneck:4")
    states = {}
    for index in range(3):
        layer = swapped(stack.layer(index), choice, stack.descriptor, config)
        variant, argument = find_variant(choice.ffn, "ffn")
        how = variant.initialise(layer, stack.layer(index), argument, "ffn", stack.descriptor, Statistics(frozenset()))
        assert how == "singular values"
        states[index] = subblock_state(layer, "ffn", stack.descriptor)

    child = assemble(parent_folder, config, [choice] + [LayerChoice()] * 2, {(0, "ffn"): states[0]}, torch.float32)
    save_child(child, parent_folder, tmp_path / "child")
    loaded = load_model(tmp_path / "child")
    assert torch.equal(loaded(IDS).logits, child(IDS).logits) and loaded.model.layers[0].mlp[0].weight.shape == (4, 32)

    settings, artifact = ScoringConfig(tokens=32, micro_batch_tokens=32), Store(str(tmp_path)).artifact("scores", {}, {})
    space = SearchSpace((layer_space,) * 3)
    scores = score_serially(stack, [IDS], space, settings, artifact, lambda layer, _: {"ffn": states[layer]}, Quiet())
    found = {row.layer: row.value for row in scores.rows if row.metric == "kl" and row.ffn == "bottleneck:4"}
    parent_log_probs, log_probs = (model(IDS).logits.log_softmax(-1) for model in (load_model(parent_folder), loaded))
    expected = torch.nn.functional.kl_div(log_probs, parent_log_probs, log_target=True, reduction="none").sum(-1).mean()
    assert found.keys() == {0, 1, 2} and found[0] == pytest.approx(float(expected), rel=1e-4) and found[0] > 0


def test_a_searcher(added):
    tables = Tables.of(SPACE, SCORES, PROFILE, Scenario(4, 30, 11), "kl", Limits(params=4000))
    with pytest.raises(ConfigError, match="unknown searcher 'cheapest'"):
        tables.search(Limits(params=4000), searcher="cheapest")
    added("puzzle_ray.search.searchers", searchers)
    (answer,) = tables.search(Limits(params=4000), searcher="cheapest")
    assert answer.architecture.searcher == "cheapest"
    assert answer.architecture.choices == (LayerChoice("noop", "ffn:64"),) * 4


def test_an_engine(added, tmp_path):
    config = tiny_config()
    space = SearchSpace((LayerSpace(("parent", "gqa:1", "noop"), ("parent", "ffn:24", "noop")),) * 3)
    settings = ProfileConfig(engine="counting", scenario=Scenario(2, 6, 3), repeats=2, stack=1)
    store = Store(str(tmp_path))
    with pytest.raises(ConfigError, match="unknown engine 'counting'"):
        profile_serially(config, space, settings, store.artifact("profile", {"engine": "unknown"}, {}), Quiet())
    added("puzzle_ray.profiling.engines", engines)
    profile = profile_serially(config, space, settings, store.artifact("profile", {}, {}), Quiet())
    assert (profile.engine, profile.engine_version, profile.device) == ("counting", "counting 1", "an abacus")
    rows = [row for row in profile.rows if row.subblock != FIXED]
    assert len(rows) == 6 and sum(row.num_params > 0 for row in rows) == 4
    for row in rows:
        assert (row.prefill_ms, row.decode_ms) == pytest.approx((row.num_params / 1000, 2 * row.num_params / 1000), abs=1e-9)


def test_an_error_names_the_nearest_of_very_many_names():
    """lm_eval has 14,000 tasks: all of them in one error were 440 kB."""
    many = [f"task_{n}" for n in range(14_000)]
    found = did_you_mean("taskk_77", many)
    assert found.startswith("did you mean 'task_77'? known: task_77, ") and found.endswith(", 13995 more") and len(found) < 200
    assert did_you_mean("xyz", many) == "known: 14000 names"
    assert did_you_mean("tsak", ["task", "other"]) == "did you mean 'task'? known: other, task"
