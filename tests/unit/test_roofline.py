"""The roofline estimate: times are what the formula gives by hand, sizes are exact, and everything that shows it says estimated."""

import csv
import io
import sys
from dataclasses import replace
from types import ModuleType

import pyarrow.parquet as pq
import pytest
import torch
from report_inputs import WHY_UNTIMED, untimed
from search_inputs import LAYERS, SCENARIO, SCORES, SPACE, make_profile
from small_models import OF_FAMILY, tiny_config
from torch import nn

from jobs.evaluate_child import comparison
from jobs.search_architecture import describe
from jobs.stages.profile import said
from jobs.sweep_budgets import line
from puzzle_ray.artifacts import Profile, Scenario
from puzzle_ray.config import load
from puzzle_ray.errors import ConfigError
from puzzle_ray.models.child import new_child
from puzzle_ray.profiling.devices import KNOWN_DEVICES, Device, device_of
from puzzle_ray.profiling.engine import engine_of
from puzzle_ray.profiling.engines.roofline import _best_s, this_cpu
from puzzle_ray.profiling.measure import PROFILE_TABLE, measure_task, num_runs, profile_of, profile_serially, profile_tasks
from puzzle_ray.profiling.memory import model_memory_mib
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.progress import Quiet
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.setup import SearchSetup
from puzzle_ray.search.sweep import Grid, finish_sweep, grid_points, point_name, solved_points
from puzzle_ray.search.tables import predicted_costs, search_architectures
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

B, T, STEPS = 2, 6, 3
HIDDEN, WIDTH, VOCAB = 32, 48, 96
Q, KV = 32, 16  # features of the queries (4 heads of 8) and of the keys (2 heads)
COMPUTES = {"name": "arithmetic alone", "tflops": {"float32": 1e-3, "fp8": 1e-3, "bfloat16": 1e-3}, "bandwidth_gb_s": 1e12}
MOVES = {"name": "traffic alone", "tflops": {"float32": 1e12, "fp8": 1e12, "bfloat16": 1e12}, "bandwidth_gb_s": 1.0}
IDEAL = {"memory_mib": 1000, "compute_efficiency": 1, "bandwidth_efficiency": 1, "kernel_us": 0, "step_us": 0}
PER_MS = {"compute": 1e6, "moves": 1e6}  # 10^9 a second


def config_of(device, **more) -> ProfileConfig:
    return ProfileConfig(**{"engine": "roofline", "device": device, "scenario": Scenario(B, T, STEPS + 1), "stack": 1} | more)


ESTIMATES: dict[str, Profile] = {}  # what tests ask for more than once


def estimated(
    device, model_config=None, attention=("gqa:1", "linear", "noop"), ffn=("ffn:24", "linear", "noop"), **more
) -> Profile:
    model_config, config = model_config or tiny_config(), config_of(device, **more)
    key = f"{model_config.to_json_string()} {attention} {ffn} {config.model_dump_json()}"
    if key not in ESTIMATES:
        items = profile_tasks(search_space(model_config, attention, ffn, 8), config)
        ESTIMATES[key] = profile_of([measure_task(item, model_config, config) for item in items], config)
    return ESTIMATES[key]


def both(profile, kind, variant, layer_type="full_attention"):
    row = profile.row(layer_type, kind, variant, B)
    return pytest.approx([row.prefill_ms, row.decode_ms])


# times by hand


def test_arithmetic_is_two_operations_a_weight_and_token_and_what_attention_adds():
    profile = estimated(COMPUTES | IDEAL)

    def products(weights):
        return [2 * weights * B * tokens / PER_MS["compute"] for tokens in (T, 1)]

    assert both(profile, "ffn", "parent") == products(3 * HIDDEN * WIDTH)
    assert both(profile, "ffn", "ffn:24") == products(3 * HIDDEN * 24)
    for kind in ("attention", "ffn"):
        assert both(profile, kind, "linear") == products(HIDDEN * HIDDEN) and both(profile, kind, "noop") == [0, 0]
    seen = [sum(range(1, T + 1)), sum(T + step for step in range(1, STEPS + 1)) / STEPS]  # token pairs; keys of a step on average
    scores = [4 * Q * B * pairs / PER_MS["compute"] for pairs in seen]
    for name, kv in (("parent", KV), ("gqa:1", KV // 2)):
        whole = products(2 * HIDDEN * Q + 2 * HIDDEN * kv)
        assert both(profile, "attention", name) == [p + s for p, s in zip(whole, scores, strict=True)]
    head = 2 * VOCAB * HIDDEN * B / PER_MS["compute"]  # of one position of each sequence
    fixed = profile.fixed(B)
    assert [fixed.prefill_ms, fixed.decode_ms] == pytest.approx([head, head])


def test_traffic_is_weights_activations_and_the_cache():
    profile = estimated(MOVES | IDEAL)
    ends = 3 * (HIDDEN + WIDTH)  # in and out of gate, up and down; crossed once by them, once by what lies between
    norm_and_residual = 2 * HIDDEN + 2 * HIDDEN
    elements = [3 * HIDDEN * WIDTH + tokens * (2 * ends + norm_and_residual) for tokens in (B * T, B)]
    assert both(profile, "ffn", "parent") == [4 * n / PER_MS["moves"] for n in elements]
    whole, half = (profile.row("full_attention", "attention", name, B).decode_ms for name in ("parent", "gqa:1"))
    cached = sum(T + step for step in range(1, STEPS + 1)) / STEPS
    saved = (
        2 * HIDDEN * KV // 2 + 2 * B * 2 * KV // 2 + B * cached * KV
    )  # weights; outputs of k and v, twice; half of both caches
    assert whole - half == pytest.approx(4 * saved / PER_MS["moves"])


def test_a_kernel_takes_the_longer_of_the_two_and_its_least_time_on_top():
    whole = estimated({"name": "both", "tflops": {"float32": 1e-3}, "bandwidth_gb_s": 1.0} | IDEAL)
    halves = [estimated(one | IDEAL) for one in (COMPUTES, MOVES)]
    for row in whole.rows:
        parts = [next(r for r in p.rows if (r.subblock, r.variant) == (row.subblock, row.variant)) for p in halves]
        assert max(p.prefill_ms for p in parts) * (1 - 1e-9) <= row.prefill_ms <= sum(p.prefill_ms for p in parts) * (1 + 1e-9)
    slow = estimated(COMPUTES | IDEAL | {"kernel_us": 1000})
    extra = (
        slow.row("full_attention", "ffn", "parent", B).decode_ms - halves[0].row("full_attention", "ffn", "parent", B).decode_ms
    )
    assert extra == pytest.approx(5)  # norm, gate, up, what lies between, down: a millisecond each
    late = estimated(COMPUTES | IDEAL | {"step_us": 1000})
    assert late.fixed(B).decode_ms - halves[0].fixed(B).decode_ms == pytest.approx(1)


def test_efficiency_divides_the_peak():
    ideal, real = estimated(COMPUTES | IDEAL), estimated(COMPUTES | IDEAL | {"compute_efficiency": 0.5})
    assert [r.prefill_ms for r in real.rows] == pytest.approx([2 * r.prefill_ms for r in ideal.rows])


def test_a_window_sees_no_further_than_it_looks_back():
    scenario = Scenario(B, 32, 9)
    profile = estimated(COMPUTES | IDEAL, attention=("window:4",), ffn=(), scenario=scenario)
    products = 2 * (2 * HIDDEN * Q + 2 * HIDDEN * KV) * B / PER_MS["compute"]
    row = profile.row("full_attention", "attention", "window:4", B)
    assert row.decode_ms == pytest.approx(products + 4 * Q * B * 4 / PER_MS["compute"])
    pairs = 1 + 2 + 3 + 4 * 29
    assert row.prefill_ms == pytest.approx(32 * products + 4 * Q * B * pairs / PER_MS["compute"])
    own = tiny_config("gemma3_text", layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=4)
    types = estimated(COMPUTES | IDEAL, own, (), (), scenario=scenario)
    full, sliding = (types.row(f"{name}_attention", "attention", "parent", B) for name in ("full", "sliding"))
    assert sliding.decode_ms == pytest.approx(row.decode_ms) and full.decode_ms > sliding.decode_ms


def test_transposed_weights_are_the_same_products():
    """GPT-2 keeps its matrices the other way around; no gate."""
    profile = estimated(COMPUTES | IDEAL, tiny_config("gpt2"))
    assert both(profile, "ffn", "parent") == [2 * 2 * HIDDEN * WIDTH * B * n / PER_MS["compute"] for n in (T, 1)]


class ThinDown:
    """Somebody's own variant: the FFN's down projection as two thin matrices."""

    name, kinds, trainable, needs = "thin", ("ffn",), False, ()

    def resolve(self, argument, kind, config, multiple_of):
        return argument

    def reshape(self, layer, argument, kind, descriptor, config):
        ffn, rank = descriptor.core(layer, "ffn"), int(argument)
        down = ffn.down_proj
        like = {"bias": False, "dtype": down.weight.dtype, "device": down.weight.device}
        thin = nn.Sequential(nn.Linear(down.in_features, rank, **like), nn.Linear(rank, down.out_features, **like))
        ffn.down_proj = thin

    def initialise(self, *_):
        return ""


def test_a_users_own_variant_is_counted_by_its_shapes(monkeypatch):
    module = ModuleType("somebodys.thin")
    module.VARIANT = ThinDown()
    monkeypatch.setitem(sys.modules, "somebodys.thin", module)
    name = "somebodys.thin:VARIANT:4"
    profile = estimated(COMPUTES | IDEAL, ffn=(name,))
    weights = 2 * HIDDEN * WIDTH + 4 * (WIDTH + HIDDEN)
    assert both(profile, "ffn", name) == [2 * weights * B * n / PER_MS["compute"] for n in (T, 1)]


FEW = ["llama", "gpt2", "gemma3_text"]  # plain; other names and no gate; two kinds of layers
OTHERS = [name for name in ("mistral", "qwen2", "qwen3", "olmo2", *OF_FAMILY) if name not in FEW]


@pytest.mark.parametrize("model_type", [*FEW, *(pytest.param(name, marks=pytest.mark.wide) for name in OTHERS)])
def test_every_family_is_estimated_and_its_sizes_are_those_of_real_tensors(model_type):
    config = tiny_config(model_type)
    space = search_space(config, ("gqa:1", "linear", "noop"), ("ffn:24", "noop"), 8)
    settings = config_of("H100")
    profile = profile_of([measure_task(item, config, settings) for item in profile_tasks(space, settings)], settings)
    choices = [layer.choices[(3 * index + 1) % len(layer.choices)] for index, layer in enumerate(space.layers)]
    costs = predicted_costs(space, profile, settings.scenario, choices)
    model = new_child(config, choices, torch.float32)
    assert costs.num_params == model.num_parameters() and costs.memory_mib == model_memory_mib(model, settings.scenario)
    assert 0 < costs.decode_ms < costs.prefill_ms < costs.runtime_ms
    parent = [r for r in profile.rows if r.variant == "parent"]
    assert all(r.prefill_ms > 0 and r.decode_ms > 0 for r in parent)


def test_fp8_halves_what_is_in_layers_and_leaves_embedding_and_head():
    half, wide = (estimated("H100", dtype=dtype) for dtype in ("fp8", "bfloat16"))
    for a, b in zip(half.rows, wide.rows, strict=True):
        in_layers = a.subblock != "fixed"
        assert (b.weight_bytes, b.kv_bytes_per_token) == (
            (2 * a.weight_bytes, 2 * a.kv_bytes_per_token) if in_layers else (a.weight_bytes, 0)
        )
        assert a.num_params == b.num_params


def test_widths_of_a_70b_ffn_are_as_near_nvlabs_table_as_the_benchmark_says(shared_data):
    from benchmarks.roofline import SHORT, TARGET, compared, measured_parts, summary_of

    folder = shared_data / "nvlabs_llama70b"
    rows = compared(folder, Scenario(256, SHORT, 1200 - SHORT))
    summary = summary_of(rows)
    assert len(measured_parts(folder)[0]) == 7 and len(rows) == 8
    assert summary["median_abs_error"] < TARGET / 2 + 0.01 and summary["max_abs_error"] < 0.15


# devices


def test_known_devices_by_any_spelling_and_changed():
    assert device_of("h100") == device_of("NVIDIA H100-SXM") == KNOWN_DEVICES["H100"]
    assert device_of("RTX 4090") is KNOWN_DEVICES["RTX4090"] or device_of("RTX 4090") == KNOWN_DEVICES["RTX4090"]
    changed = device_of({"name": "A100", "compute_efficiency": 0.5, "tflops": {"float32": 156}})
    assert changed == replace(
        KNOWN_DEVICES["A100"], compute_efficiency=0.5, tflops={"float32": 156.0, "bfloat16": 312.0, "float16": 312.0}
    )
    mine = {"name": "mine", "tflops": {"bfloat16": 100}, "bandwidth_gb_s": 500, "memory_mib": 16_000}
    assert device_of(mine) == Device("mine", {"bfloat16": 100.0}, 500.0, 16_000.0)
    assert device_of("cpu") is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("profile.engine=roofline",), "engine roofline needs a device; set profile.device to one of H100, H200"),
        (("profile.engine=roofline", "profile.device=H10"), "no device 'H10' is known; did you mean 'H100'"),
        (("profile.device=H100",), "engine is torch, which measures where it runs; drop profile.device"),
        (("profile.dtype=fp8",), "dtype fp8 is for engines roofline"),
        (("profile.engine=roofline", "profile.device=cpu", "profile.dtype=fp8"), "device cpu has no fp8"),
        (
            ("profile.engine=roofline", "profile.device={name: H100, memory: 3}"),
            "'memory' is not of a device; did you mean 'memory_mib'",
        ),
        (("profile.engine=roofline", "profile.device={name: H100, bandwidth_gb_s: fast}"), "device H100: write numbers"),
        (("profile.engine=roofline", "profile.device={name: H100, compute_efficiency: 2}"), "must be above 0 and at most 1"),
        (
            ("profile.engine=roofline", "profile.device={name: H100, bandwidth_gb_s: .nan}"),
            "bandwidth_gb_s = nan must be above 0",
        ),
        (("profile.engine=roofline", "profile.device={name: H100, bandwidth_gb_s: {a: 1}}"), "device H100: write numbers"),
        (("profile.engine=roofline", "profile.device={name: H100, kernel_us: -5}"), "kernel_us = -5 must be 0 or more"),
        (("profile.engine=roofline", "profile.device={name: H100, tflops: 5}"), "device H100: write numbers"),
        (
            ("profile.engine=roofline", "profile.device={name: H100, tflops: {bf16: 5}}"),
            "'bf16' is no dtype; did you mean 'bfloat16'",
        ),
        (("profile.engine=rofline", "profile.device=H100"), "device is for engine roofline, and engine is rofline"),
        (("profile.engine=roofline", "profile.device={name: mine}"), "also has bandwidth_gb_s, memory_mib, tflops"),
    ],
)
def test_what_is_wrong_with_a_device_is_said(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load(None, None, overrides)


def test_a_dtype_the_device_has_no_rate_for_is_refused():
    with pytest.raises(ConfigError, match="device A100 has no rate for fp8; it has float32, bfloat16, float16"):
        engine_of(config_of("A100", dtype="fp8"))


def test_this_cpu_is_probed():
    torch.set_num_threads(1)
    profile = estimated("cpu")
    assert profile.estimated and profile.device.endswith("1 threads (estimated)")
    assert all(row.prefill_ms >= 0 for row in profile.rows) and profile.fixed(B).prefill_ms > 0
    device = this_cpu("float32", 1)
    assert profile.details["machines"]["full_attention.batch_2"]["tflops"] == dict(device.tflops)
    assert device.tflops["float32"] > 0 and device.bandwidth_gb_s > 0 and device.memory_mib > 0


def test_a_probe_ends_when_it_has_taken_long_enough():
    calls = []
    _best_s(lambda: calls.append(1), repeats=9, enough_s=-1.0)
    assert len(calls) == 1
    _best_s(lambda: calls.append(1), repeats=3, enough_s=1e9)
    assert len(calls) == 4


# said to be estimates


def test_nothing_is_timed_and_the_assumptions_are_kept(tmp_path):
    config, settings = tiny_config(), config_of("H100", repeats=50)
    space = search_space(config, ("noop",), ("noop",), 8)
    (item,) = profile_tasks(space, settings)
    assert num_runs(item, settings) == 2 * len(item.stacks(settings.stack))  # not 50: they would all be the same
    step = Store(str(tmp_path)).artifact("profile", {}, {})
    profile = profile_serially(config, space, settings, step, Quiet())
    assert profile.estimated and profile.device == "H100 (estimated)" and step.facts()["estimated"]
    assert Profile.from_parquet(step.read(PROFILE_TABLE)) == profile
    assert pq.read_table(io.BytesIO(step.read(PROFILE_TABLE)), columns=["estimated"])["estimated"].to_pylist() == [True] * len(
        profile.rows
    )
    assumed = profile.details["machines"]["full_attention.batch_2"]
    assert assumed["compute_efficiency"] == 0.7 and assumed["kernel_us"] == 4.0 and assumed["bandwidth_gb_s"] == 3350.0
    assert all(row.prefill_spread_ms == row.decode_spread_ms == 0 for row in profile.rows)


ESTIMATE = replace(make_profile(4), estimated=True, engine="roofline", device="H100 (estimated)")


def test_a_run_says_in_one_line_that_costs_are_estimated():
    words = said({"estimated": True, "engine": ESTIMATE.engine, "device": ESTIMATE.device})
    assert "costs are ESTIMATED by roofline for H100" in words and "\n" not in words
    assert said({"estimated": False, "engine": "torch", "device": "cpu"}) == ""


def test_architectures_and_what_is_printed_of_them_say_so():
    for profile in (ESTIMATE, make_profile(4)):
        (found,) = search_architectures(SPACE, SCORES, profile, SCENARIO, Limits(speedup=1.5))
        assert found.estimated == profile.estimated == ("ESTIMATED, not measured" in describe(found, SPACE))


def test_a_sweeps_tables_and_lines_say_so(tmp_path):
    for name, profile in (("yes", ESTIMATE), ("no", make_profile(4))):
        setup = SearchSetup(SPACE, SCORES, profile, SCENARIO, "kl", "mip", 60.0, Limits(speedup=1.5))
        step, grid = Store(str(tmp_path / name)).artifact("sweep", {}, {}), Grid({(30, 11): setup})
        points = grid_points({"speedup": [1.2, 50.0]})
        for point in points:
            step.write_json(point_name(point), grid.solve(point))
        found = solved_points(points, step)
        finish_sweep(found, step)
        rows = list(csv.DictReader(io.StringIO(step.read("sweep.csv").decode())))
        assert [row["estimated"] for row in rows] == [str(profile.estimated), ""]  # nothing is said where there is no answer
        assert ("ESTIMATED" in line(found[0], 8)) == profile.estimated


def test_the_evaluations_comparison_says_what_each_column_is():
    (found,) = search_architectures(SPACE, SCORES, ESTIMATE, SCENARIO, Limits(speedup=1.5))
    costs = {"prefill_ms": 2.0, "decode_ms": 1.0, "runtime_ms": 12.0, "throughput_tokens_per_s": 5.0, "memory_mib": 3.0}
    evaluation = {
        "predicted": vars(found.predicted), "parent_predicted": vars(found.parent_predicted), "estimated": True,
        "models": {"parent": costs, "child": costs}, "predicted_speedup": found.predicted_speedup, "measured_speedup": 1.0,
        "measured_by": "torch on a CPU, float32",
    }  # fmt: skip
    lines = comparison(evaluation, ESTIMATE)
    assert lines[0].split() == ["ESTIMATED", "measured", "off", "by"]
    assert lines[-1] == "ESTIMATED by roofline on H100 (estimated), float32; measured by torch on a CPU, float32"
    shown = {line[:24].strip(): line[24:].split() for line in lines[1:-1]}
    wanted = ("prefill ms", "decode ms a step", "runtime ms", "tok/s", "MiB")
    assert shown.keys() == {f"{who} {what}" for who in ("parent", "child") for what in wanted} | {"speed-up"}
    assert shown["parent prefill ms"] == ["100.00", "2.00", "+4900.0%"]  # 12.5 units of 8 ms
    bare = untimed(evaluation)
    spread = comparison(bare, ESTIMATE)
    assert spread[-1].endswith(f"; speed is {WHY_UNTIMED}") and len(spread) == len(lines)
    assert spread[1].split() == ["parent", "prefill", "ms", "100.00", "-"], "nothing is made up"
    measured = comparison(evaluation | {"estimated": False}, make_profile(4))
    assert measured[0].split()[0] == "predicted" and "ESTIMATED" not in "".join(measured)
    assert len(found.choices) == LAYERS
