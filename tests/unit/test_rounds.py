"""Rounds: the child of one is the parent of the next, and the last one's is within the whole budget."""

from __future__ import annotations

import json

import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from small_models import save_parent
from small_runs import SMALL

from puzzle_ray.artifacts import LayerChoice, LayerSpace, Profile, ProfileRow, Scenario, SearchSpace
from puzzle_ray.config import validated
from puzzle_ray.distill.library import variant_file
from puzzle_ray.errors import ConfigError, Infeasible
from puzzle_ray.models.child import choices_of, load_model, new_child, read_config, save_child
from puzzle_ray.pipeline import Setting, compress, run
from puzzle_ray.progress import Quiet
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.rounds import limits_of_round
from puzzle_ray.store import Store

SCENARIO = Scenario(2, 8, 3)


def profile_row(subblock, variant, ms, params, kv):
    return ProfileRow("full_attention", subblock, variant, 2, 8, 3, ms, ms, 0.0, 0.0, 4 * params, kv, params)


PROFILE = Profile(
    (
        profile_row("attention", "parent", 2.0, 40, 8),
        profile_row("attention", "gqa:1", 1.0, 30, 4),
        profile_row("ffn", "parent", 3.0, 60, 0),
        profile_row("ffn", "ffn:8", 1.0, 20, 0),
        ProfileRow("", "fixed", "fixed", 2, 8, 3, 1.0, 1.0, 0.0, 0.0, 400, 0, 100),
    ),
    "none",
    "1",
    "any",
    "float32",
)


ORIGINAL = LayerChoice()


def space(now=ORIGINAL):
    return SearchSpace((LayerSpace(("parent", "gqa:1"), ("parent", "ffn:8"), now=now),) * 2)


def test_every_round_takes_an_equal_share_of_the_way_from_the_original():
    asked = Limits(speedup=4.0, params_fraction=0.25, kv_heads=1)
    found = [limits_of_round(asked, number, 2, space(), PROFILE, SCENARIO) for number in (1, 2)]
    parent_ms = 3 * (1 + 2 * (2 + 3))
    throughput = 1000 * 2 * 11 / parent_ms
    assert [limits.throughput_tokens_per_s for limits in found] == pytest.approx([2 * throughput, 4 * throughput])
    assert [limits.params for limits in found] == [150, 75]
    assert [limits.kv_heads for limits in found] == [2, 1]  # of 4, by the profile's bytes of gqa:1
    assert found[0].speedup is None


def test_limits_do_not_depend_on_what_the_child_is_by_then():
    asked = Limits(latency_ms=10.0, at_least={"params": 50})
    now = LayerChoice("gqa:1", "ffn:8")
    assert limits_of_round(asked, 2, 3, space(), PROFILE, SCENARIO) == limits_of_round(asked, 2, 3, space(now), PROFILE, SCENARIO)


def test_a_minimum_relative_to_the_original_is_no_share_of_a_later_rounds_child():
    asked = Limits(params_fraction=0.5, memory_fraction=0.6, at_least={"params_fraction": 0.4, "memory_fraction": 0.3})
    last = limits_of_round(asked, 2, 2, space(LayerChoice("gqa:1", "ffn:8")), PROFILE, SCENARIO)
    memory_mib = (400 + 2 * 4 * 100 + 2 * 11 * 2 * 8) / 2**20  # of the original: 300 parameters, and its cache
    assert last.at_least == pytest.approx({"params": 0.4 * 300, "memory_mib": 0.3 * memory_mib})
    assert (last.params, last.memory_mib) == (150, pytest.approx(0.6 * memory_mib))


def test_a_limit_that_the_original_meets_stays_as_it_is():
    assert limits_of_round(Limits(latency_ms=1e6), 1, 2, space(), PROFILE, SCENARIO).latency_ms == 1e6


def test_what_is_fixed_is_the_parents_own_once_it_is_there():
    asked = Limits(params=75, fixed={0: {"ffn": "ffn:8"}, 1: {"attention": "parent"}})
    fixed = limits_of_round(asked, 2, 2, space(LayerChoice("parent", "ffn:8")), PROFILE, SCENARIO).fixed
    assert (fixed[0].attention, fixed[0].ffn, fixed[1].attention) == (None, "parent", "parent")


def test_one_round_takes_the_limits_as_they_are():
    asked = Limits(speedup=1.5)
    assert limits_of_round(asked, 1, 1, space(), PROFILE, SCENARIO) is asked


def test_a_library_of_one_parent_is_no_start_for_several():
    with pytest.raises(
        ConfigError, match=r"library.narrow_from is about one parent, .* rounds=2 .*; leave it out, or set rounds: 1"
    ):
        validated({"rounds": 2, "library": {"narrow_from": "sweep.json"}})


def config_of(tmp_path, **changes):
    """A whole run's settings on a small random parent, and the folder of that parent."""
    parent = save_parent(tmp_path / "parent", vocab_size=VOCAB_SIZE + 7)
    byte_tokenizer().save_pretrained(parent)
    (parent / "text.txt").write_text("a text of some length " * 50)
    data = {"train": str(parent / "text.txt"), "sequence_length": 16}
    values = SMALL | {"parent": str(parent), "data": data, "store": str(tmp_path / "store")} | changes
    return validated(json.loads(json.dumps(values))), parent


def test_two_rounds_end_within_the_budget_and_train_no_unchanged_layer_again(tmp_path):
    limits = {"speedup": None, "params_fraction": 0.8}
    config, parent = config_of(tmp_path, rounds=2, search=SMALL["search"] | {"limits": limits})
    store = Store(config.store)
    found = run(Setting(config, store, Quiet()))
    of_parent, of_child = load_model(parent).num_parameters(), load_model(found.child).num_parameters()
    assert of_child <= 0.8 * of_parent
    assert found.evaluation["models"]["parent"]["num_params"] == of_parent
    assert found.architecture.parent_predicted.num_params == of_parent
    stages = [name.rpartition("-")[0] for name in (entry.name for entry in (tmp_path / "store").iterdir()) if "-" in name]
    counts = {name: stages.count(name) for name in ("tokens", "profile", "library", "scores", "architecture", "child", "gkd")}
    assert counts == {"tokens": 1, "profile": 1} | dict.fromkeys(("library", "scores", "architecture", "child", "gkd"), 2)
    libraries = [path for path in (tmp_path / "store").glob("library-*")]
    second = next(p for p in libraries if "carried over" in json.loads((p / "artifact.json").read_text())["inputs"])
    first = next(p for p in libraries if p != second)
    carried = json.loads(json.loads((second / "artifact.json").read_text())["inputs"]["carried over"].partition(" ")[2])
    whole = choices_of(read_config(_child_of_round(tmp_path / "store", first)))
    assert carried and carried == [index for index, choice in enumerate(whole) if choice == LayerChoice()]
    for layer in range(3):
        name = variant_file(layer, "attention", "noop")
        file = variant_file(layer, "ffn", "ffn:24")
        if (second / file).exists() and (second / name).exists():
            assert ((first / file).read_bytes() == (second / file).read_bytes()) == (layer in carried)


def test_what_no_round_can_reach_is_said_before_the_first_one(tmp_path):
    """The limits of the first rounds alone could be met."""
    estimated = SMALL["profile"] | {"engine": "roofline", "device": "H100"}
    config, _ = config_of(tmp_path, rounds=3, profile=estimated, search=SMALL["search"] | {"limits": {"speedup": 400}})
    with pytest.raises(Infeasible, match="speedup"):
        run(Setting(config, Store(config.store), Quiet()))
    assert not list((tmp_path / "store").glob("library-*"))


def test_rounds_begin_with_a_model_that_is_no_child_and_one_process_shards_nothing(tmp_path):
    parent = save_parent(tmp_path / "parent", vocab_size=VOCAB_SIZE + 7)
    byte_tokenizer().save_pretrained(parent)
    child = new_child(read_config(parent), [LayerChoice("gqa:1", "noop")] * 3, torch.float32)
    save_child(child, parent, tmp_path / "child")
    (tmp_path / "text.txt").write_text("a text of some length " * 50)
    named = {"parent": str(tmp_path / "child"), "data": str(tmp_path / "text.txt"), "store": str(tmp_path / "store")}
    settings = {"data.sequence_length": 16, "profile.scenario": {"input_tokens": 16, "output_tokens": 4}}
    with pytest.raises(ConfigError, match="2 rounds count costs from their first parent, .* is a child itself; set rounds to 1"):
        compress(**named, settings=settings | {"rounds": 2, "space.attention": ["parent"], "space.ffn": ["parent", "noop"]})
    with pytest.raises(ConfigError, match="gkd.parallel: fsdp shards a child over several processes, and this is one"):
        compress(**named, settings=settings | {"gkd.parallel": "fsdp"})


def _child_of_round(store, library):
    """The assembled child of one library."""
    key = library.name.rpartition("-")[2]
    children = [p for p in store.glob("child-*") if json.loads((p / "artifact.json").read_text())["inputs"]["library"] == key]
    return children[0] / "child"
