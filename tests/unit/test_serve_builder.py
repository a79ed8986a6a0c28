"""A server's settings: as a command line and a Serve file give them, and what Serve is told."""

import importlib.util
import io
from contextlib import redirect_stdout

import pytest
from pydantic import ValidationError
from ray import serve
from ray.serve.config import AutoscalingConfig

from actors.other_engines import tensorrt_llm_arguments, vllm_fields
from actors.serve import build, deployment_options
from jobs.serve_child import _SERVES_END, WithoutLine, named_models, server_settings
from puzzle_ray.errors import ConfigError
from puzzle_ray.serving.settings import ServeSettings


def test_one_child_or_several_models():
    assert ServeSettings.model_validate({"child": "s3://a/b/child/"}).models == {"child": "s3://a/b/child/"}
    assert named_models(["a/b", "parent=org/model"], None) == {"b": "a/b", "parent": "org/model"}
    assert named_models(["/a=b/c"], "mine") == {"mine": "/a=b/c"}  # a path may hold the sign
    for children, said in [
        (["x/a", "y/a"], "two models are called 'a'"),
        (["=a"], "write FOLDER or NAME=FOLDER"),
        (["a="], "write"),
    ]:
        with pytest.raises(ConfigError, match=said):
            named_models(children, None)


def test_words_of_a_command_line_become_settings():
    """`serve run` hands all values over as text."""
    settings = ServeSettings.model_validate({"child": "m", "max_batch_size": "4", "num_gpus": "0.5", "prefix_cache": "false"})
    assert (settings.max_batch_size, settings.num_gpus, settings.prefix_cache) == (4, 0.5, False)


@pytest.mark.parametrize(
    ("fields", "said"),
    [({}, "models"), ({"child": "a", "models": {"b": "b"}}, "child"), ({"child": "a", "max_batch": 3}, "max_batch"),
     ({"child": "a", "num_replicas": 2, "autoscaling": {"max_replicas": 3}}, "num_replicas"),
     ({"child": "a", "autoscaling": {"min_replicas": 4, "max_replicas": 3}}, "min_replicas"),
     ({"child": "a", "generation_config": "vllm"}, "generation_config"),
     ({"models": {"a": "a", "b": "b"}, "engine": "vllm"}, "takes one"), ({"child": "a", "engine_options": {"x": 1}}, "engine_options"),
     ({"child": "a", "engine": "vllm", "api_key_sha256": ["0" * 64]}, "api_key_sha256"),
     ({"child": "a", "engine": "tensorrt_llm", "kv_cache_mib": 64}, "kv_cache_mib"),
     ({"child": "a", "api_key_sha256": ["secret"]}, "api_key_sha256"), ({"child": "a", "engine": "llama.cpp"}, "engine")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_by_name(fields, said):
    with pytest.raises((ConfigError, ValidationError), match=said):
        ServeSettings.model_validate(fields)
    with pytest.raises(ConfigError, match=said):
        server_settings(**fields)


def test_serve_is_told_how_many_requests_and_replicas_there_may_be():
    fixed = deployment_options(ServeSettings(models={"a": "a", "b": "b"}, max_batch_size=4, max_waiting=8, num_replicas=3))
    assert (fixed["num_replicas"], fixed["max_ongoing_requests"], fixed["max_queued_requests"]) == (3, 2 * 12 + 16, 3 * 24)
    args = ServeSettings.model_validate({"child": "a", "autoscaling": {"max_replicas": 4, "downscale_delay_s": 60}})
    scaled = deployment_options(args)
    assert scaled["autoscaling_config"]["max_replicas"] == 4 and "num_replicas" not in scaled
    assert AutoscalingConfig(**scaled["autoscaling_config"]).model_dump().items() >= args.autoscaling.model_dump().items()
    assert isinstance(build(ServeSettings(models={"a": "a"})), serve.Application)
    assert isinstance(build(args), serve.Application)


@pytest.mark.parametrize(("num_gpus", "kind", "workers"), [(0, "cpu", None), (0.5, "gpu", None), (2, "gpu", 2)])
def test_vllm_is_told_what_the_settings_say_in_rays_words(num_gpus, kind, workers):
    """Ray's own class reads the fields. Where vLLM is not installed, the public one cannot be imported; this is what it consists of."""
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig

    settings = ServeSettings(
        models={"child": "/runs/child"}, engine="vllm", num_gpus=num_gpus, num_cpus=3, max_length=512, prefix_cache=False,
        engine_options={"gpu_memory_utilization": 0.5}, autoscaling={"max_replicas": 2},
    )  # fmt: skip
    config = LLMConfig(**vllm_fields(settings, deployment_options(settings)))
    assert (config.model_id, config.model_loading_config.model_source) == ("child", "/runs/child")
    asked = {
        "dtype": "auto",
        "max_num_seqs": 16,
        "max_model_len": 512,
        "enable_prefix_caching": False,
        "generation_config": "auto",
        "gpu_memory_utilization": 0.5,
    }
    assert config.engine_kwargs == asked | ({} if workers is None else {"tensor_parallel_size": workers})
    assert config.accelerator_config.kind == kind
    without = settings.model_copy(update={"generation_config": "none"})
    assert vllm_fields(without, {})["engine_kwargs"]["generation_config"] == "vllm"  # vLLM's word for its own defaults
    bundle = {"CPU": 3} | ({"GPU": min(1, num_gpus)} if num_gpus else {})
    assert config.placement_group_config == {"bundle_per_worker": bundle}
    assert config.deployment_config["autoscaling_config"]["max_replicas"] == 2


def test_tensorrt_llm_is_told_what_the_settings_say():
    settings = {"models": {"child": "/runs/child"}, "engine": "tensorrt_llm", "max_length": 512}
    arguments = tensorrt_llm_arguments(ServeSettings(**settings, num_gpus=2, engine_options={"max_num_tokens": 4096}))
    assert arguments["model"] == "/runs/child" and arguments["tensor_parallel_size"] == 2
    assert (arguments["max_seq_len"], arguments["max_num_tokens"]) == (512, 4096)
    for engine, num_gpus in [(tensorrt_llm_arguments, 0), (tensorrt_llm_arguments, 0.5), (lambda of: vllm_fields(of, {}), 1.5)]:
        with pytest.raises(ConfigError, match="num_gpus"):
            engine(ServeSettings(**settings, num_gpus=num_gpus))


@pytest.mark.parametrize("engine", ["vllm", "tensorrt_llm"])
def test_an_engine_that_is_not_installed_is_said_with_what_to_install(engine):
    if importlib.util.find_spec(engine) is not None:
        pytest.skip(f"{engine} is installed here")
    with pytest.raises(ConfigError, match=f"engine: is {engine}, which is not installed here.*pip install"):
        build(ServeSettings(models={"a": "a"}, engine=engine))


def test_rays_line_about_serves_end_is_left_out_and_nothing_else():
    printed = io.StringIO()
    with redirect_stdout(WithoutLine(printed, _SERVES_END)):
        print("before")
        print(f"(raylet) Task {_SERVES_END}. There are infinite retries remaining")
        print("between", "words", end="\n\n")
        print(f"{_SERVES_END} and more\n", end="")
        print("after", flush=True)
    assert printed.getvalue() == "before\nbetween words\n\nafter\n"


def test_the_request_to_try_has_a_key_where_the_server_asks_for_one(capsys):
    from jobs.serve_child import announce

    announce("0.0.0.0", 8000, "/", ["child"], "keys.txt")
    announce("127.0.0.1", 8000, "/", ["child"])
    keyed, plain = capsys.readouterr().out.splitlines()
    assert "-H 'Authorization: Bearer KEY' -d '{" in keyed and keyed.endswith("(KEY: a line of keys.txt)")
    assert "Authorization" not in plain and plain.endswith("}'")
