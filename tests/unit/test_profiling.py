"""Profiles: sizes are exact, costs add up to whole models, and what was measured is never measured again."""

import dataclasses
import io
import random

import pyarrow.parquet as pq
import pytest
import torch
from small_models import tiny_config

from puzzle_ray.artifacts import MIB, LayerChoice, Profile, Scenario
from puzzle_ray.errors import ConfigError, ProfileError
from puzzle_ray.models.child import new_child
from puzzle_ray.profiling import measure as profiling
from puzzle_ray.profiling.engine import Timing, find_engine, measure_side_by_side, spread
from puzzle_ray.profiling.engines.torch_engine import ENGINE
from puzzle_ray.profiling.machine import GPU_FACTS, machine_facts, parse_gpu_facts
from puzzle_ray.profiling.measure import (
    Measurement,
    ProfileTask,
    StackTiming,
    SubblockSize,
    activation_bytes,
    measure_task,
    merge_profile,
    num_runs,
    profile_of,
    profile_serially,
    profile_tasks,
    stack_config,
    subblock_sizes,
)
from puzzle_ray.profiling.memory import _Live, kv_bytes_per_token, model_memory_mib
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.progress import Quiet
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.tables import Tables, predicted_costs
from puzzle_ray.store import Store
from puzzle_ray.surgery.kv_cache import cache_from
from puzzle_ray.variants.space import search_space

CONFIG = ProfileConfig(scenario=Scenario(2, 6, 3), repeats=2, stack=1)
ATTENTION, FFN = ("gqa:1", "linear", "noop"), ("ffn:24", "linear", "noop")


def space_of(config):
    return search_space(config, ATTENTION, FFN, 8)


@pytest.fixture(scope="module")
def measured() -> Measurement:
    torch.set_num_threads(1)
    config = tiny_config()
    (item,) = profile_tasks(space_of(config), CONFIG)
    return measure_task(item, config, CONFIG)


def test_activations_are_those_of_a_real_prefill_and_a_known_device_keeps_room_for_them():
    config = tiny_config()
    (item,) = profile_tasks(space_of(config), CONFIG)
    found = activation_bytes(item, config, CONFIG)
    tokens = 2 * 6
    assert found >= 4 * tokens * (2 * config.hidden_size + 2 * config.intermediate_size), "residual, gate and up at once"
    twice = activation_bytes(dataclasses.replace(item, batch_size=4), config, CONFIG)
    assert 1.9 * found < twice <= 2 * found
    ids = torch.zeros(2, 6, dtype=torch.long)
    for choice in (LayerChoice(), LayerChoice("gqa:1", "ffn:24"), LayerChoice("noop", "linear")):
        model = new_child(config, [choice] * config.num_hidden_layers, torch.float32).eval()
        with torch.inference_mode(), _Live() as live:
            model(ids, use_cache=False, logits_to_keep=1)
        assert 0 < live.peak <= found, choice

    profile = profile_serially(
        config, space_of(config), CONFIG, Store("memory://activations").artifact("profile", {}, {}), Quiet()
    )
    assert profile.details["activation_mib"] == {"2": found / MIB}
    known = dataclasses.replace(profile, details=profile.details | {"memory_mib": 10.0, "reserved_mib": 1.0})
    tables = Tables(space_of(config), known, "kl", None, ())
    assert tables.bounded(Limits(speedup=2), 2).memory_mib == pytest.approx(9.0 - found / MIB)
    assert (
        tables.bounded(Limits(memory_mib=3.0), 2).memory_mib == 3.0 and tables.bounded(Limits(memory_mib=30), 2).memory_mib < 9.0
    )


class Heard(Quiet):
    """Counts what the bar is told."""

    total = done = 0

    def stage(self, name, total, unit):
        from contextlib import nullcontext

        self.total = total
        return nullcontext(self)

    def advance(self, count=1, **facts):
        self.done += count


class Paced:
    """An engine on which models take as long as they say."""

    name = "paced"

    def __init__(self):
        self.calls = []

    def time_once(self, model, scenario):
        self.calls.append(model)
        return model * (1.0 + len(self.calls)), 0.0


# plan


def test_every_shape_of_the_space_is_in_exactly_one_item_per_batch_size():
    config = tiny_config("qwen3", layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=4)
    space = space_of(config)
    items = profile_tasks(space, CONFIG.model_copy(update={"batch_sizes": (1, 2, 8)}))
    assert [(i.layer_type, i.batch_size) for i in items] == [
        (t, b) for b in (1, 2, 8) for t in ("full_attention", "sliding_attention")
    ]
    assert len({item.name for item in items}) == len(items)
    for item in items:
        assert item.attention == ("parent", *ATTENTION) and item.ffn == ("parent", *FFN)
        stacks = item.stacks(3)
        assert len(stacks) == len(set(stacks)) == len(item.attention) + len(item.ffn) and {depth for _, depth in stacks} == {3, 6}
        assert {c.attention for c, _ in stacks} == set(item.attention) and {c.ffn for c, _ in stacks} == set(item.ffn)


def test_a_space_without_no_ops_still_gets_its_base_stack_but_no_row_for_it():
    config = tiny_config()
    (item,) = profile_tasks(search_space(config, ("parent",), ("parent",), 8), CONFIG)
    nothing = LayerChoice("noop", "noop")
    assert item.stacks(2) == ((nothing, 2), (nothing, 4), (LayerChoice("noop"), 4), (LayerChoice(), 4))
    profile = profile_of([measure_task(item, config, CONFIG)], CONFIG)
    assert [(r.subblock, r.variant) for r in profile.rows] == [("attention", "parent"), ("ffn", "parent"), ("fixed", "fixed")]


def test_a_stack_has_the_layers_of_its_type_only():
    config = tiny_config("qwen3", layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=4)
    stack = stack_config(config, "sliding_attention", 5)
    assert stack.layer_types == ["sliding_attention"] * 5 and stack.num_hidden_layers == 5
    assert config.num_hidden_layers == 3


# sizes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_predicted_sizes_of_any_architecture_are_those_of_its_tensors(model_type, tied):
    config = tiny_config(model_type, tie_word_embeddings=tied)
    space = space_of(config)
    profile = profile_of([measure_task(item, config, CONFIG) for item in profile_tasks(space, CONFIG)], CONFIG)
    rng = random.Random(0)
    for _ in range(4):
        choices = [rng.choice(layer.choices) for layer in space.layers]
        model = new_child(config, choices, torch.float32)
        predicted = predicted_costs(space, profile, CONFIG.scenario, choices)
        assert predicted.num_params == model.num_parameters()
        assert predicted.memory_mib == model_memory_mib(model, CONFIG.scenario)


@torch.inference_mode()
def test_kv_bytes_are_what_the_cache_grows_by_with_the_stub_left_out():
    config = tiny_config()
    choices = [LayerChoice("parent"), LayerChoice("noop"), LayerChoice("gqa:1")]
    model = new_child(config, choices, torch.bfloat16).eval()
    ids = torch.zeros(3, 7, dtype=torch.long)
    cache = cache_from(model(ids, use_cache=True)).layers
    taken = [layer.keys.nbytes + layer.values.nbytes for layer in cache]
    found = kv_bytes_per_token(model, 64)
    assert found == (2 * 2 * 8 * 2, 0, 2 * 1 * 8 * 2)  # keys and values x KV heads x head_dim x bytes
    assert [found[0] * ids.numel(), found[2] * ids.numel()] == [taken[0], taken[2]]


def test_memory_counts_weights_once_and_the_whole_batch_at_full_length():
    model = new_child(tiny_config(), [LayerChoice()] * 3, torch.float32)
    kv_bytes = 3 * 2 * 2 * 8 * 4  # layers x keys and values x KV heads x head_dim x bytes
    expected = 4 * model.num_parameters() + kv_bytes * 2 * (6 + 3)
    assert model_memory_mib(model, CONFIG.scenario) == expected / MIB


def test_a_no_op_has_no_weights_and_no_cache(measured):
    empty = {(s.subblock, s.variant) for s in measured.sizes if s.weight_bytes == s.num_params == s.kv_bytes_per_token == 0}
    assert empty == {("attention", "noop"), ("ffn", "noop")}
    assert all(s.kv_bytes_per_token == 0 for s in measured.sizes if s.subblock != "attention" or s.variant == "linear")


def test_sizes_without_memory_are_those_of_the_models_that_were_timed(measured):
    config = tiny_config()
    (item,) = profile_tasks(space_of(config), CONFIG)
    assert subblock_sizes(item, config, CONFIG) == measured.sizes


def test_weights_follow_the_dtype():
    config = tiny_config()
    (item,) = profile_tasks(space_of(config), CONFIG)
    half = measure_task(item, config, CONFIG.model_copy(update={"dtype": "bfloat16"}))
    whole = measure_task(item, config, CONFIG)
    assert [(2 * h.weight_bytes, 2 * h.kv_bytes_per_token, h.num_params) for h in half.sizes] == [
        (w.weight_bytes, w.kv_bytes_per_token, w.num_params) for w in whole.sizes
    ]


# costs


def result_of(layer_ms, fixed_ms, drift=(1.0, 1.0, 1.0), noise=0.0, batch_size=2, device="cpu", layer_type="full") -> Measurement:
    """What would be measured if a layer cost the sum of its halves, on a machine whose pace changes from round to round."""
    rng = random.Random(0)
    attention, ffn = (tuple(v for k, v in layer_ms if k == kind) for kind in ("attention", "ffn"))
    item = ProfileTask(layer_type, batch_size, attention, ffn)
    stacks = []
    for choice, depth in item.stacks(4):
        ms = fixed_ms + depth * (layer_ms["attention", choice.attention] + layer_ms["ffn", choice.ffn])
        samples = tuple(d * ms * (1 + rng.uniform(-noise, noise)) for d in drift)
        stacks.append(StackTiming(choice.attention, choice.ffn, depth, Timing(samples, tuple(s / 10 for s in samples))))
    sizes = tuple(SubblockSize(kind, variant, 0, 0, 0) for kind, variant in [*layer_ms, ("fixed", "fixed")])
    return Measurement(item, tuple(stacks), sizes, "1.0", device)


LAYER_MS = {
    ("attention", "parent"): 5.0,
    ("attention", "noop"): 0.5,
    ("ffn", "parent"): 7.0,
    ("ffn", "ffn:24"): 3.0,
    ("ffn", "noop"): 0.0,
}


def costs(profile: Profile) -> dict[tuple[str, str], float]:
    return {(r.subblock, r.variant): r.prefill_ms for r in profile.rows}


def test_costs_of_an_additive_machine_are_found_exactly():
    profile = profile_of([result_of(LAYER_MS, fixed_ms=20.0)], CONFIG)
    assert costs(profile) == pytest.approx(LAYER_MS | {("fixed", "fixed"): 20.0})
    for row in profile.rows:
        assert row.decode_ms == pytest.approx(row.prefill_ms / 10)
        assert row.prefill_spread_ms == pytest.approx(0, abs=1e-9)


def test_a_machine_that_changes_pace_between_rounds_does_not_change_what_costs_are_relative_to_each_other():
    steady = costs(profile_of([result_of(LAYER_MS, 20.0)], CONFIG))
    drifting = costs(profile_of([result_of(LAYER_MS, 20.0, drift=(1.0, 3.0, 1.5))], CONFIG))
    assert drifting == pytest.approx({key: 1.5 * ms for key, ms in steady.items()})


def test_noise_never_makes_a_cost_negative():
    free = {key: (1e-9 if value < 1 else value) for key, value in LAYER_MS.items()}
    for fixed_ms in (0.0, 20.0):
        profile = profile_of([result_of(free, fixed_ms, noise=0.2, drift=(1.0,) * 9)], CONFIG)
        assert all(r.prefill_ms >= 0 and r.decode_ms >= 0 for r in profile.rows)
        assert any(r.prefill_ms == 0 for r in profile.rows)


def test_the_parents_halves_add_up_to_what_the_whole_layer_took(measured):
    whole = next(s.timing for s in measured.stacks if (s.attention, s.ffn) == ("parent", "parent"))
    series = profiling.subblock_series(measured, "prefill")
    total = series["fixed", "fixed"] + 2 * CONFIG.stack * (series["attention", "parent"] + series["ffn", "parent"])
    assert total == pytest.approx(list(whole.prefill_samples_ms))


def test_the_no_op_ffn_is_free_by_definition(measured):
    profile = profile_of([measured], CONFIG)
    row = profile.row("full_attention", "ffn", "noop", 2)
    assert (row.prefill_ms, row.decode_ms, row.prefill_spread_ms, row.decode_spread_ms) == (0, 0, 0, 0)


def test_layer_types_share_one_fixed_row_per_batch_size():
    types = {"full": 20.0, "sliding": 10.0}
    results = [result_of(LAYER_MS, ms, batch_size=b, layer_type=t) for b in (1, 2) for t, ms in types.items()]
    profile = profile_of(results, CONFIG)
    assert profile.batch_sizes == (1, 2)
    assert [r.prefill_ms for r in profile.rows if r.subblock == "fixed"] == pytest.approx([15.0, 15.0])
    assert profile.fixed(2).layer_type == ""


def test_the_order_of_results_does_not_matter():
    results = [result_of(LAYER_MS, 20.0 + b, batch_size=b) for b in (1, 2, 16)]
    assert profile_of(results, CONFIG) == profile_of(results[::-1], CONFIG)


def test_devices_of_different_kinds_do_not_mix():
    results = [result_of(LAYER_MS, 20.0, batch_size=b, device=d) for b, d in ((1, "NVIDIA H100"), (2, "NVIDIA A100"))]
    with pytest.raises(ProfileError, match="NVIDIA A100; .*NVIDIA H100.*label_selector"):
        profile_of(results, CONFIG)


def test_spread_is_half_the_inter_quartile_range():
    assert spread([0.0, 1.0, 2.0, 3.0, 100.0]) == 1.0
    timing = Timing((3.0, 1.0, 2.0), (5.0, 5.0, 7.0))
    assert (timing.prefill_ms, timing.decode_ms, timing.prefill_spread_ms, timing.decode_spread_ms) == (2.0, 5.0, 0.5, 0.5)


def test_a_layer_under_every_stack_is_not_in_what_is_in_no_layer():
    bare = result_of(LAYER_MS, fixed_ms=20.0)
    own = LAYER_MS["attention", "parent"] + LAYER_MS["ffn", "parent"]
    standing = dataclasses.replace(result_of(LAYER_MS, fixed_ms=20.0 + own), base_layers=1)
    assert costs(profile_of([standing], CONFIG)) == pytest.approx(costs(profile_of([bare], CONFIG)))


def test_a_profile_without_the_column_for_estimates_is_read_as_measured():
    profile = profile_of([result_of(LAYER_MS, fixed_ms=20.0)], CONFIG)
    assert not any(row.estimated for row in profile.rows)
    table = pq.read_table(io.BytesIO(profile.to_parquet()))
    older = io.BytesIO()
    pq.write_table(table.drop_columns("estimated"), older)
    assert Profile.from_parquet(older.getvalue()) == profile


# what identifies a measurement


def test_a_profile_keeps_its_machines_and_how_far_repeats_lay_apart(measured):
    details = profile_of([measured], CONFIG).details
    assert details["machines"] == {"full_attention.batch_2": dict(measured.machine)}
    assert measured.machine["threads"] == 1 and measured.machine["cores"] >= 1
    found = details["relative_spread"]
    shares = [s.timing.prefill_spread_ms / s.timing.prefill_ms for s in measured.stacks]
    assert found["prefill"]["max"] == max(shares) and 0 <= found["prefill"]["median"] <= found["prefill"]["max"]
    assert Profile.from_parquet(profile_of([measured], CONFIG).to_parquet()).details == details


def test_a_gpus_facts_are_read_from_nvidia_smis_answer():
    assert GPU_FACTS[:2] == ("driver_version", "clocks.sm")
    found = parse_gpu_facts("580.95.05, 1980, 1980, 3201, [N/A], 41\n")
    clocks = {"clocks_sm": 1980.0, "clocks_max_sm": 1980.0, "clocks_mem": 3201.0}
    assert found == {"driver_version": "580.95.05", "temperature_gpu": 41.0} | clocks
    assert parse_gpu_facts("") == {}


def test_a_cpus_facts_are_what_it_shows():
    facts = machine_facts(torch.device("cpu"))
    assert facts["threads"] == torch.get_num_threads() and facts.get("cpu_mhz", 1) > 0


# timing


def test_models_are_timed_in_turn_and_the_warm_up_is_not_kept():
    engine, heard = Paced(), Heard()
    timings = measure_side_by_side({"a": 1.0, "b": 2.0, "c": 4.0}, CONFIG.scenario, 5, engine, heard)
    rounds = [engine.calls[3 * i : 3 * i + 3] for i in range(6)]
    assert all(sorted(r) == [1.0, 2.0, 4.0] for r in rounds) and len({tuple(r) for r in rounds}) > 1
    assert [len(t.prefill_samples_ms) for t in timings.values()] == [5, 5, 5] and heard.done == 18
    first_kept = {model: model * (1.0 + engine.calls.index(model, 3) + 1) for model in (1.0, 2.0, 4.0)}
    assert [t.prefill_samples_ms[0] for t in timings.values()] == list(first_kept.values())


def test_a_prefill_and_the_steps_after_it_are_what_the_model_sees():
    config, seen = tiny_config(), []
    model = new_child(config, [LayerChoice("noop"), LayerChoice(), LayerChoice()], torch.float32).eval()

    def hook(module, args, kwargs, out):
        seen.append((tuple(args[0].shape), tuple(out.logits.shape), cache_from(out).get_seq_length()))

    handle = model.register_forward_hook(hook, with_kwargs=True)
    prefill_ms, decode_ms = ENGINE.time_once(model, CONFIG.scenario)
    handle.remove()
    assert seen == [((2, 6), (2, 1, 96), 6), ((2, 1), (2, 1, 96), 7), ((2, 1), (2, 1, 96), 8)]
    assert prefill_ms > 0 and decode_ms > 0


def test_one_output_token_needs_no_decode_step():
    model = new_child(tiny_config(), [LayerChoice()] * 3, torch.float32).eval()
    timing = ENGINE.time_model(model, Scenario(1, 4, 1), repeats=2)
    assert timing.decode_ms == 0 and timing.prefill_ms > 0


def test_stacks_share_what_is_in_no_layer():
    config = tiny_config()
    first = ENGINE.build(config, [LayerChoice()] * 3, "float32")
    second = ENGINE.build(config, [LayerChoice("noop", "noop")] * 3, "float32", like=first)
    assert second.lm_head.weight is first.lm_head.weight is first.model.embed_tokens.weight
    assert second.model.embed_tokens is first.model.embed_tokens


def test_what_cannot_be_measured_is_refused_in_words():
    config = tiny_config()
    (item,) = profile_tasks(space_of(config), CONFIG)
    with pytest.raises(ConfigError, match="unknown engine 'toch'; did you mean 'torch'"):
        measure_task(item, config, CONFIG.model_copy(update={"engine": "toch"}))
    with pytest.raises(ConfigError, match="cannot be imported.*package.module:ATTRIBUTE"):
        find_engine("no_such_package:ENGINE")
    long = CONFIG.model_copy(update={"scenario": Scenario(2, 100, 100)})
    with pytest.raises(ProfileError, match="200 tokens in and out do not fit the parent's 128 positions"):
        measure_task(item, config, long)
    if not torch.cuda.is_available():
        with pytest.raises(ProfileError, match="a GPU is asked for"):
            measure_task(item, config, CONFIG.model_copy(update={"num_gpus": 1}))


def test_engines_are_found_by_name_and_by_dotted_path():
    assert find_engine("torch") is find_engine("puzzle_ray.profiling.engines.torch_engine:ENGINE") is ENGINE
    assert "torch" in ENGINE.version() and "threads" in ENGINE.device_name()


# the stage


def test_a_result_survives_its_file(measured):
    assert Measurement.from_json(measured.to_json()) == measured
    assert {len(s.timing.prefill_samples_ms) for s in measured.stacks} == {CONFIG.repeats}
    assert {s.num_layers for s in measured.stacks} == {CONFIG.stack, 2 * CONFIG.stack}


def test_the_stage_leaves_a_table_that_covers_the_space(tmp_path):
    config = tiny_config()
    space, heard = space_of(config), Heard()
    several = CONFIG.model_copy(update={"batch_sizes": (1,)})
    step = Store(str(tmp_path)).artifact("profile", {}, {})
    profile = profile_serially(config, space, several, step, heard)
    assert Profile.from_parquet(step.read(profiling.PROFILE_TABLE)) == profile and step.finished
    assert heard.done == heard.total == sum(num_runs(item, several) for item in profile_tasks(space, several))
    for batch_size in (1, 2):
        scenario = dataclasses.replace(CONFIG.scenario, batch_size=batch_size)
        for choice in space.layers[0].choices:
            predicted = predicted_costs(space, profile, scenario, [choice] * 3)
            assert predicted.batch_size == batch_size and predicted.runtime_ms >= 0 and predicted.num_params > 0


def test_an_item_that_is_there_is_not_measured_again(tmp_path, measured):
    config = tiny_config()
    space = space_of(config)
    several = CONFIG.model_copy(update={"batch_sizes": (1,)})
    step = Store(str(tmp_path)).artifact("profile", {}, {})
    profiling.save_measurement(step, measured)
    assert [item.batch_size for item in profiling.unfinished_tasks(profile_tasks(space, several), step)] == [1]
    profile = profile_serially(config, space, several, step, Quiet())
    expected = profile_of([measured], CONFIG)
    assert [r for r in profile.rows if r.batch_size == 2] == list(expected.rows)
    assert merge_profile(profile_tasks(space, several), several, step) == profile
