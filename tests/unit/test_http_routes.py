"""The routes of a server, asked as clients ask: the ASGI application itself, without Ray and without a port."""

import asyncio
import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from ray import serve
from small_models import tiny_config
from transformers import AutoModelForCausalLM

from actors.child_server import ChildServer, app
from puzzle_ray.serving.engine import Engine
from puzzle_ray.serving.openai_api import OpenAIService, ServedModel
from puzzle_ray.serving.settings import ServeSettings

KEYS = {"error": {"message", "type", "param", "code"}}


@pytest.fixture(scope="module")
def server():
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_config(tiny_config(vocab_size=VOCAB_SIZE)), byte_tokenizer()
    replica = next(base for base in ChildServer.func_or_class.__mro__ if "_reply" in vars(base))
    server = object.__new__(type("Replica", (replica,), {"__del__": lambda self: None}))  # Serve itself awaits the replica's own
    server.settings, server._engines = ServeSettings(models={"tiny": "nowhere"}), []
    with Engine(model, tokenizer, max_batch_size=4, max_waiting=16) as engine:
        server.service = OpenAIService([ServedModel("tiny", engine, tokenizer)])
        yield server


@pytest.fixture
def ask(server, monkeypatch):
    """A function that sends a request and returns status, headers and body."""
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(servable_object=server, replica_tag="replica"))

    def ask(method, path, body=b"", fault=False, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        encoded = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b""}
        scope |= {"headers": encoded, "scheme": "http", "server": ("here", 80), "client": ("there", 1), "http_version": "1.1"}
        sent = []

        async def receive():
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(message):
            sent.append(message)

        async def run():
            try:
                await app(scope, receive, send)
            except ZeroDivisionError:
                assert fault

        asyncio.run(run())
        start, *parts = sent
        found = {name.decode(): value.decode() for name, value in start["headers"]}
        return start["status"], found, b"".join(part.get("body", b"") for part in parts)

    return ask


def test_a_slash_at_the_end_of_a_path_changes_nothing(ask):
    body = {"prompt": "x", "max_tokens": 2, "temperature": 0}
    (_, _, plain), (status, _, slashed) = ask("POST", "/v1/completions", body), ask("POST", "/v1/completions/", body)
    assert status == 200 and json.loads(slashed)["choices"] == json.loads(plain)["choices"]
    for path in ("/v1/models", "/health", "/metrics"):
        assert ask("GET", path + "/")[0] == 200
    assert json.loads(ask("GET", "/v1/models/")[2])["object"] == "list"
    assert json.loads(ask("GET", "/v1/models/tiny/")[2])["id"] == "tiny"


def test_those_who_watch_may_ask_for_the_head_alone(ask):
    assert [ask("HEAD", path)[0] for path in ("/health", "/metrics", "/v1/models", "/v1/models/tiny")] == [200] * 4
    assert ask("HEAD", "/v1/completions")[0] == 405


def test_an_encoded_body_is_refused_for_what_it_is(ask):
    body = gzip.compress(json.dumps({"prompt": "x"}).encode())
    status, _, answer = ask("POST", "/v1/completions", body, content_encoding="gzip")
    assert status == 415 and "gzip" in json.loads(answer)["error"]["message"]
    plain = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    assert ask("POST", "/v1/completions", plain, content_encoding="identity", content_type="text/plain")[0] == 200


def test_a_fault_of_the_server_is_an_error_as_clients_read_it(ask, server, monkeypatch):
    monkeypatch.setattr(server.service, "models", lambda: 1 / 0)
    status, _, answer = ask("GET", "/v1/models", fault=True)
    assert status == 500 and {name: set(error) for name, error in json.loads(answer).items()} == KEYS
    assert "ZeroDivisionError" in json.loads(answer)["error"]["message"]


def test_large_bodies_are_read_as_small_ones_are(ask):
    small = json.dumps({"prompt": "x", "max_tokens": 2, "temperature": 0}).encode()
    (_, _, plain), (status, _, padded) = (
        ask("POST", "/v1/completions", small),
        ask("POST", "/v1/completions", small + b" " * 2**18),
    )
    assert status == 200 and json.loads(padded)["choices"] == json.loads(plain)["choices"]
    status, _, answer = ask("POST", "/v1/completions", {"prompt": [0] * 10**5 + ["a"]})
    assert status == 400 and json.loads(answer)["error"]["param"] == "prompt" and len(answer) < 1000


def test_events_of_a_stream_are_kept_by_nobody_on_the_way(ask):
    status, headers, answer = ask("POST", "/v1/completions", {"prompt": "x", "max_tokens": 2, "stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")
    assert answer.startswith(b"data: {") and answer.endswith(b"data: [DONE]\n\n")


def test_a_conversation_that_is_too_long_has_the_code_by_which_clients_shorten_it(ask):
    for body in ({"prompt": "x" * 200}, {"prompt": "x" * 10**6}, {"prompt": "x", "max_tokens": 500}):
        status, _, answer = ask("POST", "/v1/completions", body)
        error = json.loads(answer)["error"]
        assert (status, error["code"]) == (400, "context_length_exceeded")
        assert "this model's maximum context length is 128" in error["message"]
