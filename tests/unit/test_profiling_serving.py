"""Serving engines' arithmetic with stand-ins that take modelled times: block costs are slopes, the rest is the intercept."""

import json
import os
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from small_models import tiny_config

from jobs.checks import check
from puzzle_ray.artifacts import LayerChoice, Lengths, Scenario, to_json
from puzzle_ray.config import load
from puzzle_ray.errors import ConfigError, ParentError, ProfileError
from puzzle_ray.export.nemotron_nas import write_config
from puzzle_ray.profiling import measure as profiling
from puzzle_ray.profiling.engine import engine_of
from puzzle_ray.profiling.engines.tensorrt_llm import ENGINE as TENSORRT
from puzzle_ray.profiling.engines.vllm import ENGINE as VLLM
from puzzle_ray.profiling.measure import Measurement, check_shapes, measure, profile_of, profile_tasks, runs_of
from puzzle_ray.profiling.serving_engine import ServingEngine, time_one
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

CONFIG = ProfileConfig(engine="vllm", num_gpus=1, scenario=Scenario(2, 6, 4), repeats=2, stack=2, dtype="bfloat16")
FIXED_MS, PER_TOKEN = 7.0, 0.5  # what is in no layer; what a prompt token costs of a step


def half_ms(half) -> float:
    """What the stand-in takes for half a layer: by its width, and something of its own."""
    if half["no_op"]:
        return 0.0
    if half["replace_with_linear"]:
        return 0.25
    return 3.0 / half["n_heads_in_group"] if "n_heads_in_group" in half else half["ffn_mult"]


def layer_ms(block) -> float:
    return half_ms(block["attention"]) + half_ms(block["ffn"])


class StandIn(ServingEngine):
    """Takes as long as its config's layers say, in this process, and tells what it was asked."""

    name, package, extra, biases, linear = "stand-in", "torch", "none", True, True

    def __init__(self):
        self.asked, self.blocks = [], []

    def start(self, folder, scenario, dtype):
        config = json.loads((folder / "config.json").read_text())
        self.blocks.append(config["block_configs"])
        step_s = 1e-3 * (FIXED_MS + sum(layer_ms(block) for block in config["block_configs"]))

        def generate(prompts, new_tokens):
            self.asked.append((len(prompts), {len(ids) for ids in prompts}, new_tokens))
            assert all(0 <= i < config["vocab_size"] for ids in prompts for i in ids)
            return step_s * (PER_TOKEN * len(prompts[0]) + new_tokens - 1)

        return generate

    def _isolated(self, folder, scenario, config):
        return self.timed(self.start(folder, scenario, config.dtype), 96, scenario, config.repeats)

    def _gpu(self):
        return torch.device("cpu")

    def device_name(self, use_gpu=False):
        return "a stand-in"


@pytest.fixture
def engine(monkeypatch):
    engine = StandIn()
    monkeypatch.setattr(profiling, "engine_of", lambda config: engine)
    return engine


def parent(**changes):
    return tiny_config(**({"intermediate_size": 1536, "num_key_value_heads": 4} | changes))


def profiled(config=CONFIG, attention=("gqa:1", "noop"), ffn=("ffn:512", "linear", "noop")):
    space = search_space(parent(), attention, ffn, 256)
    results = [measure(item, parent(), config) for item in profile_tasks(space, config)]
    return profile_of([Measurement.from_json(to_json(result)) for result in results], config), space


def test_slopes_are_block_costs_and_the_layer_all_stacks_stand_on_is_not_in_the_rest(engine):
    profile, _ = profiled()
    mult = 3 * 1536 / (2 * 32)
    expected = {
        ("attention", "parent"): 3.0, ("attention", "gqa:1"): 0.75, ("attention", "noop"): 0.0,
        ("ffn", "parent"): mult, ("ffn", "ffn:512"): mult / 3, ("ffn", "linear"): 0.25, ("ffn", "noop"): 0.0,
        ("fixed", "fixed"): FIXED_MS,
    }  # fmt: skip
    found = {(r.subblock, r.variant): (r.prefill_ms, r.decode_ms) for r in profile.rows}
    assert found.keys() == expected.keys()
    for key, ms in expected.items():
        assert found[key] == pytest.approx((PER_TOKEN * 6 * ms, ms), abs=1e-9)
    assert not profile.estimated and profile.details["machines"]["full_attention.batch_2"]["threads"] > 0


def test_every_stack_begins_with_the_parents_own_layer_and_is_asked_for_whole_batches(engine):
    _, space = profiled()
    (item,) = profile_tasks(space, CONFIG)
    stacks = item.stacks(CONFIG.stack)
    standard = engine.blocks[0][0]
    assert not standard["attention"]["no_op"] and not standard["ffn"]["no_op"]
    assert [len(blocks) for blocks in engine.blocks] == [1 + depth for _, depth in stacks]
    assert all(blocks[0] == standard and len({json.dumps(b) for b in blocks[1:]}) == 1 for blocks in engine.blocks)
    each = [(2, {6}, 1), (2, {6}, 4)]  # T(1), then T(4)
    assert engine.asked == each * (CONFIG.repeats + 1) * len(stacks)
    assert runs_of(item, CONFIG) == len(stacks) * (CONFIG.repeats + 1)


def test_requests_of_differing_lengths_are_asked_for_kind_by_kind(engine):
    mixed = Scenario(2, 8.0, 2.0, (Lengths(10, 1, 3.0), Lengths(2, 5, 1.0)))
    profile, _ = profiled(CONFIG.model_copy(update={"scenario": mixed}), (), ())
    fixed = profile.fixed(2)
    assert fixed.prefill_ms == pytest.approx(PER_TOKEN * 8 * FIXED_MS) and fixed.decode_ms == pytest.approx(FIXED_MS)
    assert {(lengths.pop(), tokens) for _, lengths, tokens in engine.asked} == {(10, 1), (2, 1), (2, 5)}


def test_fp8_sizes_are_those_of_fp8_and_the_config_stays_bfloat16(engine):
    half, whole = (profiled(CONFIG.model_copy(update={"dtype": dtype}))[0] for dtype in ("fp8", "bfloat16"))
    pairs = [(a, b) for a, b in zip(half.rows, whole.rows, strict=True) if a.subblock != "fixed"]
    assert all((2 * a.weight_bytes, 2 * a.kv_bytes_per_token) == (b.weight_bytes, b.kv_bytes_per_token) for a, b in pairs)


def test_what_an_engine_lacks_is_refused_before_it_is_started(engine):
    engine.linear = False
    with pytest.raises(ConfigError, match="stand-in has no linear subblocks; drop linear from the search space"):
        profiled()
    engine.linear, engine.biases = True, False
    config = parent(attention_bias=True)
    (item,) = profile_tasks(search_space(config, (), (), 8), CONFIG)
    with pytest.raises(ParentError, match="attention_bias"):
        measure(item, config, CONFIG)
    with pytest.raises(ConfigError, match="no 'window:64'"):
        profiled(attention=("window:64",))
    assert engine.blocks == []


def test_a_run_is_refused_before_it_begins_where_the_engine_cannot_run_its_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr(type(VLLM), "version", lambda self: "vllm 1.0")
    overrides = ("profile.engine=vllm", "profile.num_gpus=1")
    with pytest.raises(ConfigError, match="multiples of 256 only"):
        check(load("tiny", None, overrides), Store(str(tmp_path)))
    space = search_space(parent(), ("gqa:1", "noop"), ("ffn:512", "noop"), 256)
    check_shapes(space, parent(), CONFIG)
    granite = tiny_config("granite")
    with pytest.raises(ParentError, match="granite is not one of llama, mistral, qwen2"):
        check_shapes(search_space(granite, (), (), 8), granite, CONFIG)
    check_shapes(search_space(granite, (), (), 8), granite, CONFIG.model_copy(update={"engine": "torch"}))


# the engines themselves


@pytest.mark.parametrize(("engine", "extra"), [(VLLM, "vllm"), (TENSORRT, "tensorrt")])
def test_a_missing_package_names_the_extra(engine, extra, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ConfigError, match=rf"{engine.name} needs the package .*pip install \"puzzle_ray\[{extra}\]\""):
        engine_of(CONFIG.model_copy(update={"engine": engine.name}))


def test_a_missing_gpu_is_said(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    with pytest.raises(ConfigError, match="engine vllm runs on one GPU, and profile.num_gpus is 0; set profile.num_gpus=1"):
        engine_of(CONFIG.model_copy(update={"num_gpus": 0}))
    assert engine_of(CONFIG).version() == "vllm 1.0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ProfileError, match="vllm needs a GPU, and PyTorch sees none here; use engine torch or roofline"):
        VLLM.device_name(True)


class Recorder:
    """In place of a package's `LLM`: keeps what it is asked to generate."""

    def __init__(self):
        self.calls = []

    def generate(self, inputs, wanted, use_tqdm):
        self.calls.append((inputs, wanted))


def asked_of(engine, prompts, new_tokens, monkeypatch):
    llm = Recorder()
    monkeypatch.setattr(engine, "load", lambda *_: (llm, dict))
    assert engine.start(Path("/folder"), Scenario(2, 2, 3), "bfloat16")(prompts, new_tokens) >= 0
    return llm.calls[-1]


def test_vllm_is_asked_for_random_weights_whole_batches_and_tokens_without_end(monkeypatch):
    arguments = VLLM.arguments(Path("/folder"), Scenario(8, 100, 28), "fp8")
    wanted = {"load_format": "dummy", "max_num_seqs": 8, "max_model_len": 128, "enable_prefix_caching": False}
    assert wanted.items() <= arguments.items() and arguments["model"] == "/folder" and arguments["skip_tokenizer_init"]
    assert (arguments["dtype"], arguments["quantization"], arguments["kv_cache_dtype"]) == ("bfloat16", "fp8", "fp8")
    plain = VLLM.arguments(Path("/folder"), Scenario(8, 100, 28), "float16")
    assert (plain["dtype"], plain["quantization"], plain["kv_cache_dtype"]) == ("float16", None, "auto")
    inputs, sampling = asked_of(VLLM, [[1, 2], [3, 4]], 5, monkeypatch)
    assert inputs == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3, 4]}]
    assert sampling == {"max_tokens": 5, "ignore_eos": True, "detokenize": False, "temperature": 0.0}


def test_tensorrt_llm_is_asked_for_the_same(monkeypatch, tmp_path):
    arguments = TENSORRT.arguments(tmp_path, Scenario(8, 100, 28), "fp8")
    assert {"load_format": "dummy", "max_batch_size": 8, "max_seq_len": 128, "dtype": "bfloat16"}.items() <= arguments.items()
    TENSORRT.quantise(tmp_path, "bfloat16")
    assert list(tmp_path.iterdir()) == []
    TENSORRT.quantise(tmp_path, "fp8")
    quantisation = json.loads((tmp_path / "hf_quant_config.json").read_text())["quantization"]
    assert (quantisation["quant_algo"], quantisation["kv_cache_quant_algo"]) == ("FP8", "FP8")
    inputs, sampling = asked_of(TENSORRT, [[1, 2]], 3, monkeypatch)
    assert inputs == [[1, 2]] and sampling == {
        "max_tokens": 3,
        "ignore_eos": True,
        "detokenize": False,
        "end_id": -1,
        "pad_id": 0,
    }


# a process of its own

OTHER = """
import os
from pathlib import Path
from puzzle_ray.profiling.serving_engine import ServingEngine


class Other(ServingEngine):
    name, package, extra, biases, linear = "other_engine:ENGINE", "torch", "none", True, True

    def start(self, folder, scenario, dtype):
        if scenario.batch_size > 100:
            os._exit(1)
        (Path(folder) / "pid").write_text(str(os.getpid()))
        return lambda prompts, new_tokens: 1e-3 * len(prompts) * new_tokens


ENGINE = Other()
"""


def test_each_stack_is_timed_in_a_process_of_its_own_whose_death_is_said(tmp_path, monkeypatch):
    (tmp_path / "other_engine.py").write_text(OTHER)
    monkeypatch.syspath_prepend(str(tmp_path))
    from other_engine import ENGINE

    write_config(tmp_path / "stack", parent(), [LayerChoice()], "float32")
    timing = ENGINE._isolated(tmp_path / "stack", CONFIG.scenario, CONFIG)
    assert timing.prefill_samples_ms == (2.0, 2.0) and timing.decode_samples_ms == pytest.approx((2.0, 2.0))
    assert int((tmp_path / "stack/pid").read_text()) != os.getpid()
    assert time_one(ENGINE.name, tmp_path / "stack", CONFIG.scenario, "float32", 1).prefill_samples_ms == (2.0,)
    with pytest.raises(ProfileError, match="other_engine:ENGINE died at batch size 101 on layers of .*lower profile.stack"):
        ENGINE._isolated(tmp_path / "stack", replace(CONFIG.scenario, batch_size=101), CONFIG)
