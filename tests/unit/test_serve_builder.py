"""A server's settings: as a command line and a Serve file give them, and what Serve is told."""

import importlib.util

import pytest
from pydantic import ValidationError
from ray import serve

from actors.serve import build, deployment_options
from jobs.serve_child import named_models, server_settings
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
     ({"models": {"a": "a", "b": "b"}, "engine": "vllm"}, "takes one"), ({"child": "a", "engine_options": {"x": 1}}, "engine_options"),
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
    scaled = deployment_options(ServeSettings(models={"a": "a"}, autoscaling={"min_replicas": 1, "max_replicas": 4}))
    assert scaled["autoscaling_config"]["max_replicas"] == 4 and "num_replicas" not in scaled
    assert isinstance(build(ServeSettings(models={"a": "a"})), serve.Application)


@pytest.mark.parametrize("engine", ["vllm", "tensorrt_llm"])
def test_an_engine_that_is_not_installed_is_said_with_what_to_install(engine):
    if importlib.util.find_spec(engine) is not None:
        pytest.skip(f"{engine} is installed here")
    with pytest.raises(ConfigError, match=f"engine: is {engine}, which is not installed here.*pip install"):
        build(ServeSettings(models={"a": "a"}, engine=engine))
