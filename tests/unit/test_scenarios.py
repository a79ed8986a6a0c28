"""What is served: by name, by lengths, by a log of requests; and batch sizes that are found instead of given."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from search_inputs import SCENARIO, SCORES, SPACE, make_profile
from small_models import tiny_config

from jobs.checks import check
from jobs.run import Run
from puzzle_ray.artifacts import MIB, LayerChoice, Lengths, Profile, Scenario, ScoreRow, Scores
from puzzle_ray.config import RunConfig, load, validated
from puzzle_ray.errors import ConfigError, Infeasible, ProfileError
from puzzle_ray.models.child import new_child
from puzzle_ray.profiling.batch_sizes import with_batch_sizes
from puzzle_ray.profiling.engine import mean_over_lengths, measure_side_by_side
from puzzle_ray.profiling.measure import activation_bytes, measure_task, profile_of, profile_tasks
from puzzle_ray.profiling.memory import model_memory_mib
from puzzle_ray.profiling.scenarios import NAMED_SCENARIOS, grouped_requests, scenario_of
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.sweep import grid_contexts, longest_context
from puzzle_ray.search.tables import Tables, predicted_costs, search_architectures
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

MIX = (Lengths(10, 2, 3.0), Lengths(4, 11, 1.0))
LOG = [(10, 2)] * 3 + [(4, 11)]


def profile_config(**profile) -> ProfileConfig:
    return validated({"profile": profile}).profile


def scenario(value) -> Scenario:
    return profile_config(scenario=value).scenario


# what a config may say


def test_names_stand_for_lengths_with_a_batch_size_beside():
    assert scenario("chat") == Scenario(16, 128, 128) == scenario({"name": "chat"})
    assert scenario({"name": "rag", "batch_size": 64}) == Scenario(64, 2048, 128)
    assert {name: scenario(name).longest_tokens for name in NAMED_SCENARIOS} == {
        "chat": 256, "long_generation": 1152, "reasoning": 4224, "rag": 2176, "long_context": 4096,
    }  # fmt: skip


def test_plain_numbers_still_do_and_what_is_left_out_is_the_default():
    assert scenario({"batch_size": 2, "input_tokens": 16, "output_tokens": 4}) == Scenario(2, 16, 4)
    assert load(None, None, ("profile.scenario.batch_size=32",)).profile.scenario == Scenario(32, 256, 32)
    assert scenario({"batch_size": 2, "kv_tokens": 100}).kv_tokens_per_sequence == 100


def test_an_override_by_name_or_lengths_takes_the_place_of_a_recipes_counts():
    assert load("tiny", None, ("profile.scenario={name: chat, batch_size: 8}",)).profile.scenario == Scenario(8, 128, 128)
    assert load("tiny", None, ("profile.scenario.name=rag",)).profile.scenario == Scenario(16, 2048, 128)
    assert load("tiny", None, ("profile.scenario.input_tokens=64",)).profile.scenario == Scenario(16, 64, 32)
    two = load("tiny", None, ("profile.scenario.lengths=[{input_tokens: 8, output_tokens: 2}]",)).profile.scenario
    assert (two.batch_size, two.input_tokens, two.output_tokens) == (16, 8, 2)


def test_a_name_and_a_batch_size_may_be_given_in_any_order_and_form():
    name, size = "profile.scenario=chat", "profile.scenario.batch_size=8"
    for overrides in ((name, size), (size, name), ("profile.scenario.name=chat", size)):
        assert (
            load("tiny", None, overrides).profile.scenario
            == Scenario(8, 128, 128)
            == load(None, None, overrides).profile.scenario
        )


def test_a_config_that_was_written_out_is_read_back_as_itself():
    given = {
        "batch_size": 4,
        "lengths": [{"input_tokens": 10, "output_tokens": 2, "weight": 3}, {"input_tokens": 4, "output_tokens": 11}],
    }
    for value in (given, "chat", {"name": "chat", "batch_size": "auto"}):
        config = validated({"profile": {"scenario": value}})
        assert RunConfig.model_validate(config.model_dump(mode="json")) == config
    assert scenario(given).lengths == MIX


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("chatt", "no scenario 'chatt'; did you mean 'chat'.*or give input_tokens and output_tokens"),
        ({"batch": 3}, "'batch' is not of a scenario; did you mean 'batch_size'"),
        ({"name": "chat", "input_tokens": 5}, r"a name stands for its lengths; write \{name: chat, batch_size: 16\}"),
        ({"batch_size": 0}, "batch_size = 0: write a whole number of at least 1 .or auto"),
        ({"input_tokens": 1.5}, "input_tokens = 1.5: write a whole number"),
        ({"input_tokens": float("inf")}, "input_tokens = inf: write a whole number"),
        ({"input_tokens": float("nan")}, "input_tokens = nan: write a whole number"),
        ({"name": ["chat"]}, r"there is no scenario \['chat'\]"),
        ({"lengths": []}, "lengths is empty; write a list of"),
        ({"lengths": 3}, "write a list of"),
        ({"lengths": [{"input_tokens": 3}]}, r"write \{input_tokens: 128, output_tokens: 64, weight: 2\}"),
        ({"lengths": [{"input_tokens": 3, "output_tokens": 1, "weight": 0}]}, "weight 0: write a number above 0"),
        ({"lengths": [{"input_tokens": 3, "output_tokens": 1}], "input_tokens": 9}, "whose mean is 3; leave it out"),
        ({"lengths": "nowhere.csv"}, "no file 'nowhere.csv' of request lengths"),
        ({"lengths": {"path": "x"}}, r"write \{file: requests.csv, groups: 8\}"),
    ],
)
def test_what_is_wrong_with_a_scenario_is_said(value, words):
    with pytest.raises(ConfigError, match=f"profile.scenario: .*{words}"):
        scenario(value)


# requests of differing lengths


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_log_of_requests_is_read(tmp_path, suffix):
    file = tmp_path / f"requests{suffix}"
    columns = {"input_tokens": [i for i, _ in LOG], "output_tokens": [o for _, o in LOG]}
    if suffix == ".parquet":
        pq.write_table(pa.table(columns), file)
    elif suffix == ".csv":  # as spreadsheets write it
        file.write_text("\ufefftime, input_tokens, output_tokens\n" + "".join(f"0, {i}.0, {o}\n" for i, o in LOG), "utf-8")
    else:
        file.write_text("".join(f'{{"input_tokens": {i}, "output_tokens": {o}}}\n' for i, o in LOG))
    assert scenario({"batch_size": 4, "lengths": str(file)}) == Scenario(4, 8.5, 4.25, MIX[::-1])


def test_a_log_that_cannot_be_read_is_refused(tmp_path):
    for name, text, words in (
        ("a.csv", "prompt,answer\n1,2\n", "needs columns input_tokens and output_tokens"),
        ("b.csv", "input_tokens,output_tokens\n", "has no requests"),
        ("c.csv", "input_tokens,output_tokens\n5,0\n", r"a request of \(5, 0\) tokens"),
        ("d.txt", "", "is no .csv, .jsonl or .parquet file"),
        ("e.csv", "input_tokens,output_tokens\nten,2\n", "e.csv' cannot be read .*'ten'.*of whole numbers"),
        ("f.jsonl", '{"input_tokens": 5.7, "output_tokens": 2}', "f.jsonl' cannot be read .5.7 is no number of tokens"),
        ("g.jsonl", '{"input_tokens": null, "output_tokens": 2}', "g.jsonl' cannot be read"),
        ("h.parquet", "no parquet", "h.parquet' cannot be read"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=words):
            scenario({"lengths": str(tmp_path / name)})


def test_groups_of_requests_keep_their_number_and_their_means(tmp_path):
    rng = random.Random(0)
    requests = [(rng.randint(1, 900), int(rng.lognormvariate(4, 1)) + 1) for _ in range(997)]
    kinds = grouped_requests(requests, 6)
    weight = sum(kind.weight for kind in kinds)
    assert weight == len(requests) and len(kinds) == 6
    for i, name in enumerate(("input_tokens", "output_tokens")):
        mean = sum(kind.weight * getattr(kind, name) for kind in kinds) / weight
        assert mean == pytest.approx(sum(r[i] for r in requests) / len(requests), abs=0.5)  # each group's mean is rounded
    file = tmp_path / "log.csv"
    file.write_text("input_tokens,output_tokens\n" + "".join(f"{i},{o}\n" for i, o in requests))
    found = scenario({"lengths": {"file": str(file), "groups": 6}})
    assert found.lengths == kinds and found.kv_tokens_per_sequence == max(map(sum, requests)) > found.longest_tokens


class Counting:
    """An engine that takes a millisecond a prompt token, and in a step as many as there are answer tokens."""

    def time_once(self, model, shape):
        return float(shape.input_tokens), float(shape.output_tokens) if shape.output_tokens > 1 else 0.0


def test_samples_are_means_such_that_prefill_and_steps_take_what_requests_take():
    mixed = scenario_of({"batch_size": 4, "lengths": [vars(kind) for kind in MIX]})
    timing = measure_side_by_side({"a": None}, mixed, 2, Counting())["a"]
    each = [i + (o - 1) * o for i, o in ((10, 2), (4, 11))]
    assert timing.prefill_ms == 8.5
    assert timing.prefill_ms + (mixed.output_tokens - 1) * timing.decode_ms == pytest.approx((3 * each[0] + each[1]) / 4)
    no_steps = scenario_of({"lengths": [{"input_tokens": 3, "output_tokens": 1}]})
    assert mean_over_lengths(no_steps, [(2.0, 0.0)]) == (2.0, 0.0)


def profiled(config: ProfileConfig, model_config, space) -> Profile:
    return profile_of([measure_task(item, model_config, config) for item in profile_tasks(space, config)], config)


def roofline(**more) -> ProfileConfig:
    return profile_config(**{"engine": "roofline", "device": "L40S", "stack": 1} | more)


def test_costs_are_means_over_requests_and_memory_holds_the_longest():
    model_config = tiny_config()
    space = search_space(model_config, ("gqa:1", "noop"), ("ffn:24", "noop"), 8)
    mixed = roofline(scenario={"batch_size": 4, "lengths": [vars(kind) for kind in MIX]})
    choices = [LayerChoice("gqa:1"), LayerChoice(), LayerChoice("noop", "ffn:24")]
    found = predicted_costs(space, profiled(mixed, model_config, space), mixed.scenario, choices)
    alone = []
    for kind in MIX:
        one = roofline(scenario={"batch_size": 4, "input_tokens": kind.input_tokens, "output_tokens": kind.output_tokens})
        alone.append(predicted_costs(space, profiled(one, model_config, space), one.scenario, choices))
    for name in ("prefill_ms", "runtime_ms"):
        assert getattr(found, name) == pytest.approx((3 * getattr(alone[0], name) + getattr(alone[1], name)) / 4)
    assert found.throughput_tokens_per_s == pytest.approx(1000 * 4 * (8.5 + 4.25) / found.runtime_ms)
    model = new_child(model_config, choices, torch.float32)
    assert found.memory_mib == alone[1].memory_mib == model_memory_mib(model, mixed.scenario) > alone[0].memory_mib


def test_the_longest_request_must_fit_the_parent():
    model_config = tiny_config()
    lengths = [{"input_tokens": 8, "output_tokens": 2, "weight": 1e6}, {"input_tokens": 128, "output_tokens": 1}]
    config = roofline(scenario={"lengths": lengths})
    with pytest.raises(ProfileError, match="129 tokens in and out do not fit the parent's 128 positions"):
        profiled(config, model_config, search_space(model_config, (), (), 8))


def test_a_sweep_over_lengths_needs_one_length():
    config = profile_config(scenario={"batch_size": 4, "lengths": [vars(kind) for kind in MIX]})
    assert grid_contexts({"speedup": [2.0]}, config.scenario) == [(8.5, 4.25)]
    assert longest_context({"speedup": [2.0]}, config) == 15
    with pytest.raises(ConfigError, match="search.sweep.input_tokens: the scenario has lengths"):
        grid_contexts({"input_tokens": [16]}, config.scenario)
    kept = profile_config(scenario={"name": "chat", "kv_tokens": 200}).scenario
    assert grid_contexts({"speedup": [2.0]}, kept) == [(128, 128)]
    with pytest.raises(ConfigError, match="search.sweep.output_tokens: the scenario has kv_tokens"):
        grid_contexts({"output_tokens": [4096]}, kept)
    assert grid_contexts({"input_tokens": [16, 64]}, scenario("chat")) == [(16, 128), (64, 128)]


# batch sizes found


def limits(memory_mib) -> Limits:
    return Limits(memory_mib=memory_mib)


def test_auto_takes_powers_of_two_up_to_what_fits():
    """By hand: weights and batch x tokens x KV bytes, for the parent and for the smallest child."""
    model_config = tiny_config()
    space = search_space(model_config, ("gqa:1",), ("ffn:24",), 8)
    config = profile_config(scenario={"input_tokens": 20, "output_tokens": 12, "batch_size": "auto"})

    def mib(choice, size):
        return model_memory_mib(new_child(model_config, [choice] * 3, torch.float32), Scenario(size, 20, 12))

    room = mib(LayerChoice(), 8) * 1.01
    found = with_batch_sizes(config, model_config, space, room)
    sizes = [1 << i for i in range(9)]
    assert found.batch_sizes == tuple(size for size in sizes if mib(LayerChoice("gqa:1", "ffn:24"), size) <= room)
    assert found.scenario == Scenario(max(size for size in sizes if mib(LayerChoice(), size) <= room), 20, 12)
    assert found.scenario.batch_size == 8 < found.batch_sizes[-1] < 256
    assert found.memory_mib is None and with_batch_sizes(found, model_config, space, 1.0) is found

    device = config.model_copy(update={"memory_mib": 2.0, "reserved_mib": 0.3})
    item = profile_tasks(space, config.model_copy(update={"batch_sizes": ()}))[0]

    def fits(size) -> bool:
        """On a device activations and what is reserved take room, too."""
        held = activation_bytes(replace(item, batch_size=size), model_config, config) / MIB
        return mib(LayerChoice("gqa:1", "ffn:24"), size) + held + 0.3 <= 2.0

    found = with_batch_sizes(device, model_config, space, None)
    assert found.batch_sizes == tuple(size for size in sizes if fits(size)) and found.memory_mib == 2.0
    assert with_batch_sizes(device.model_copy(update={"reserved_mib": 1.5}), model_config, space, None).batch_sizes[-1] < max(
        found.batch_sizes
    )


def test_auto_stops_at_max_batch_size_and_knows_a_devices_memory():
    model_config = tiny_config()
    space = search_space(model_config, ("noop",), ("noop",), 8)
    found = with_batch_sizes(roofline(batch_sizes="auto", max_batch_size=48), model_config, space, None)
    assert found.batch_sizes == (1, 2, 4, 8, 16, 32) and found.scenario.batch_size == 32
    assert found.memory_mib == 46_068.0
    assert found == with_batch_sizes(roofline(batch_sizes="auto", max_batch_size=63), model_config, space, None)
    own = with_batch_sizes(roofline(batch_sizes="auto", memory_mib=4.0), model_config, space, None)
    assert own.memory_mib == 4.0 and own.scenario.batch_size < 32


def test_auto_is_refused_where_memory_is_unknown_or_too_small():
    model_config = tiny_config()
    space = search_space(model_config, ("noop",), ("noop",), 8)
    with pytest.raises(ConfigError, match="auto needs to know how much memory there is; set profile.memory_mib"):
        with_batch_sizes(profile_config(batch_sizes="auto"), model_config, space, None)
    with pytest.raises(ConfigError, match=r"the parent needs 0\.\d MiB at batch size 1 and there are 0\.0"):
        with_batch_sizes(profile_config(batch_sizes="auto"), model_config, space, 0.01)
    assert profile_config(scenario={"name": "chat", "batch_size": "auto"}, batch_sizes=[]).batch_sizes == "auto"
    with pytest.raises(ConfigError, match=r"batch_sizes = 'all': write whole numbers, such as \[8, 16\], or auto"):
        profile_config(batch_sizes="all")
    with pytest.raises(ConfigError, match=r"batch_size auto beside batch_sizes \[1, 2\]; leave batch_sizes out"):
        profile_config(scenario={"name": "chat", "batch_size": "auto"}, batch_sizes=[1, 2])


def test_a_run_profiles_the_sizes_that_were_found_and_a_check_says_what_is_missing(tmp_path):
    model_config = tiny_config()
    space = search_space(model_config, ("noop",), ("noop",), 8)
    config = validated({"profile": {"batch_sizes": "auto", "memory_mib": 2.0}, "search": {"limits": {"speedup": 2}}})
    run = SimpleNamespace(config=config, parent=SimpleNamespace(model_config=model_config), whole_space=space, after=None)
    found = Run.profile_config.func(run)
    assert found == with_batch_sizes(config.profile, model_config, space, config.search.limits.memory_mib) and found.batch_sizes[
        :2
    ] == (
        1,
        2,
    )
    store = Store(str(tmp_path))
    with pytest.raises(ConfigError, match="profile.batch_sizes: auto needs to know"):
        check(load("tiny", None, ("profile.batch_sizes=auto",)), store)
    check(load("tiny", None, ("profile.batch_sizes=auto", "search.limits.memory_mib=40", "search.sweep.batch_size=[8]")), store)
    with pytest.raises(ConfigError, match="search.sweep.batch_size: 9 is not profiled"):
        check(load("tiny", None, ("profile.batch_sizes=auto", "profile.memory_mib=40", "search.sweep.batch_size=[9]")), store)


def test_no_answer_needs_more_memory_than_the_device_has():
    """At batch 8 the least damage comes with half the throughput asked for; only memory keeps the search from it."""
    profile = make_profile(4, 8)
    free = Tables.of(SPACE, SCORES, profile, SCENARIO, "kl", Limits(speedup=1.05))
    assert free.search(Limits(speedup=1.05))[0].architecture.predicted.batch_size == 8
    small = predicted_costs(SPACE, profile, SCENARIO, [LayerChoice()] * 4).memory_mib
    bound = replace(profile, details={"memory_mib": small})
    (found,) = search_architectures(SPACE, SCORES, bound, SCENARIO, Limits(speedup=1.05))
    assert found.predicted.memory_mib <= small and found.limits == {"speedup": 1.05, "memory_mib": small}
    (tighter,) = search_architectures(SPACE, SCORES, bound, SCENARIO, Limits(memory_mib=small / 2))
    assert tighter.limits == {"memory_mib": small / 2}
    with pytest.raises(Infeasible, match="memory_mib"):
        search_architectures(SPACE, SCORES, replace(profile, details={"memory_mib": 0.1}), SCENARIO, Limits(speedup=1.05))


def test_the_search_chooses_among_the_batch_sizes_that_were_found():
    """End to end on an estimate: more sequences at once serve more tokens a second, as long as memory lasts."""
    model_config = tiny_config(num_hidden_layers=4, max_position_embeddings=256)
    space = search_space(model_config, ("gqa:2", "noop"), ("ffn:24", "noop"), 8)
    asked = roofline(
        scenario={"input_tokens": 1, "output_tokens": 255, "batch_size": "auto"},
        device={"name": "L40S", "memory_mib": 5.0},
        max_batch_size=512,
    )
    config = with_batch_sizes(asked, model_config, space, None)
    profile = profiled(config, model_config, space).with_details(config.memory())
    assert profile.batch_sizes == config.batch_sizes == tuple(1 << i for i in range(10)) and profile.details["memory_mib"] == 5.0
    damage = {"gqa:1": 0.3, "gqa:2": 0.3, "noop": 1.0, "ffn:24": 0.2, "parent": 0.0}
    rows = [
        ScoreRow(layer, c.attention, c.ffn, "kl", damage[c.attention] + damage[c.ffn], 0.0, 1)
        for layer in range(4) for c in space.layers[layer].choices[1:]
    ]  # fmt: skip
    (found,) = search_architectures(space, Scores(tuple(rows), "block"), profile, config.scenario, Limits(speedup=1.5))
    assert found.parent_predicted.batch_size == config.scenario.batch_size
    assert found.predicted.batch_size > found.parent_predicted.batch_size and found.predicted.memory_mib <= 5.0
    assert found.predicted_speedup >= 1.5 and found.estimated
    assert (
        found.parent_predicted.memory_mib <= 5.0 < found.parent_predicted.memory_mib * 2
    )  # the largest power that the parent fits
