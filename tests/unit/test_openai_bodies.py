"""What a request may hold: honoured or refused by name, within limits, and every refusal can be sent."""

import asyncio
import hashlib
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from puzzle_ray.errors import ConfigError, PuzzleError
from puzzle_ray.serving.access import KeyCheck, key_digests, read_body
from puzzle_ray.serving.api_errors import BodyRefused, KeyRefused, UnknownModel, error_response, validation_body
from puzzle_ray.serving.generation import EngineBusy, EngineFailed
from puzzle_ray.serving.requests import ChatRequest, CompletionRequest, parse

ASK = {"model": "tiny", "prompt": "some text", "temperature": 0, "max_tokens": 9, "ignore_eos": True}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "ignore_eos": True}


def test_null_and_neutral_fields_change_nothing():
    nulls = dict.fromkeys(
        ["top_p", "top_k", "seed", "stop", "stream", "stream_options", "user", "logprobs", "n", "best_of", "echo"]
    )
    neutral = {"suffix": "", "service_tier": "auto", "metadata": {"a": "b"}, "prompt_cache_key": "k"}
    assert CompletionRequest(**ASK, **nulls) == CompletionRequest(**ASK, **neutral) == CompletionRequest(**ASK)
    (params,) = CompletionRequest(prompt="x").sampling_params()
    assert params.max_tokens == 16
    neutral = {
        "response_format": {"type": "text"}, "tool_choice": "none", "tools": [], "parallel_tool_calls": True, "store": False,
        "modalities": ["text"], "functions": [], "function_call": "none", "audio": None, "reasoning_effort": None,
        "prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "implicit"},
    }  # fmt: skip
    assert ChatRequest(**CHAT, **neutral) == ChatRequest(**CHAT)
    assert ChatRequest(**CHAT, logprobs=False, top_logprobs=0).logprob_params() == {"logprobs": None}
    assert CompletionRequest(**ASK, logprobs=False) == CompletionRequest(**ASK)  # and not log-probabilities without alternatives
    part = {"type": "text", "text": "hello", "prompt_cache_breakpoint": {"mode": "explicit"}}
    (turn,) = ChatRequest(**CHAT | {"messages": [{"role": "user", "content": [part]}]}).messages
    assert turn.turn() == CHAT["messages"][0]
    unused = {"tools": [{"type": "function"}], "tool_choice": "none", "functions": [{"name": "f"}], "function_call": "none"}
    assert ChatRequest(**CHAT, **unused) == ChatRequest(**CHAT)  # tools that must not be called
    asked = {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": False}}
    assert not CompletionRequest(**ASK, **asked).stream_options.include_usage


UNSUPPORTED = [
    (CompletionRequest, {"suffix": "x"}), (CompletionRequest, {"stream_options": {"include_usage": True}}),
    (CompletionRequest, {"n": 0}), (CompletionRequest, {"n": 10**6}), (CompletionRequest, {"best_of": 3, "stream": True}),
    (CompletionRequest, {"n": 3, "best_of": 2}), (CompletionRequest, {"max_tokens": 0}),
    (CompletionRequest, {"logprobs": 21}), (CompletionRequest, {"logit_bias": {"5": 101}}), (CompletionRequest, {"logit_bias": {"x": 1}}),
    (CompletionRequest, {"presence_penalty": float("nan")}), (CompletionRequest, {"stop": ["a"] * 33}),
    (CompletionRequest, {"stop_token_ids": [5] * 1025}),
    (ChatRequest, {"response_format": {"type": "json_object"}}), (ChatRequest, {"tool_choice": "required"}),
    (ChatRequest, {"tools": [{"type": "function"}]}), (ChatRequest, {"tools": [{"type": "function"}], "tool_choice": "auto"}),
    (ChatRequest, {"functions": [{"name": "f"}], "tool_choice": "none"}), (ChatRequest, {"top_logprobs": 2}),
    (ChatRequest, {"max_tokens": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields"), UNSUPPORTED, ids=str)
def test_what_is_not_supported_is_refused_by_name(kind, fields):
    with pytest.raises(ConfigError) as caught:
        kind(**(ASK if kind is CompletionRequest else CHAT) | fields).sampling_params()
    status, body = error_response(caught.value)
    named = "best_of" if "best_of" in fields else next(iter(fields))
    assert (status, body["error"]["param"]) == (400, named)


@pytest.mark.parametrize(("field", "value"), [("tempreature", 1), ("prompt", 3.5), ("prompt", None), ("max_tokens", "many")])
def test_malformed_bodies_name_the_field(field, value):
    with pytest.raises(ValidationError) as caught:
        CompletionRequest(**ASK | {field: value})
    error = validation_body(caught.value.errors())["error"]
    assert error["param"] == field and error["message"].startswith(field) and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CompletionRequest, {"prompt": [0] * 10**5 + ["a"]}),
        (CompletionRequest, {"prompt": [[0.5]] * 10**5}),
        (CompletionRequest, {"stop": [1] * 10**5}),
        (CompletionRequest, {"stop_token_ids": ["a"] * 10**5}),
        (CompletionRequest, {"logit_bias": {f"a{number}": "b" for number in range(10**5)}}),
        (CompletionRequest, {f"a{number}": 1 for number in range(10**5)}),
        (CompletionRequest, {"stream_options": {f"a{number}": 1 for number in range(10**5)}}),
        (ChatRequest, {"messages": [1] * 10**5}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text"}] * 10**5}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": "x"} | {f"a{number}": 1 for number in range(10**5)}]}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value.__name__,
)
def test_however_much_is_wrong_the_error_is_short(kind, fields):
    """Pydantic makes an error for each of a million wrong values, which takes gigabytes, and seconds of the event loop."""
    with pytest.raises((ConfigError, ValidationError)) as caught:
        kind(**(ASK if kind is CompletionRequest else CHAT) | fields)
    assert not isinstance(caught.value, ValidationError) or caught.value.error_count() < 10


def messages(*parts: bytes, pause_s: float = 0.0):
    """An ASGI receive of these parts of a body."""
    left = list(parts)

    async def receive():
        await asyncio.sleep(pause_s)
        part = left.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(left)}

    return receive


def test_bodies_are_read_up_to_a_limit_of_bytes_and_time():
    def read(receive, headers=(), limit=10):
        return asyncio.run(read_body(dict(headers), receive, limit, 0.05))

    assert read(messages(b"12345", b"67890")) == b"1234567890"
    for refused, status in [
        (lambda: read(messages(b"12345", b"67890", b"1")), 413),
        (lambda: read(messages(b""), {"content-length": "11"}), 413),
        (lambda: read(messages(b"", pause_s=5)), 408),
        (lambda: read(messages(*[b""] * 1000, pause_s=0.01)), 408),  # each part in time, and there is no end of them
    ]:
        with pytest.raises(BodyRefused) as caught:
            refused()
        assert error_response(caught.value)[0] == status


@given(
    body=st.binary(max_size=40)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["model", "prompt", "n", "messages", "x"]), inner),
    ).map(lambda value: json.dumps(value).encode())
)
@settings(max_examples=150, deadline=None)
def test_whatever_the_body_is_the_error_can_be_sent(body):
    for kind in (CompletionRequest, ChatRequest):
        try:
            parse(kind, body)
        except PuzzleError as error:
            said = error_response(error)
            assert said[0] == 400
        except ValidationError as error:
            said = 400, validation_body(error.errors())
        else:
            continue
        json.dumps(said[1], ensure_ascii=False, allow_nan=False).encode("utf-8")  # as JSONResponse does


@pytest.mark.parametrize(
    "body", [b"[" * 10**5, b'{"model": "\\ud800", "prompt": "x", "\\ud800": 1}', b"\xff", b"", b"[]", b"NaN"]
)
def test_odd_bodies_are_refused_with_a_message(body):
    with pytest.raises((PuzzleError, ValidationError)) as caught:
        parse(CompletionRequest, body)
    error = caught.value
    said = error_response(error)[1] if isinstance(error, PuzzleError) else validation_body(error.errors())
    assert json.dumps(said, ensure_ascii=False).encode("utf-8")


def test_only_requests_with_a_known_key_get_through(tmp_path):
    file = tmp_path / "keys"
    file.write_text("first\n\nsecond\n")
    digests = key_digests(str(file))
    assert digests == tuple(hashlib.sha256(key).hexdigest() for key in (b"first", b"second"))

    def status(path, authorization=None, digests=digests, method="POST"):
        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})

        sent = []

        async def send(message):
            sent.append(message)

        headers = [] if authorization is None else [(b"authorization", authorization)]
        scope = {"type": "http", "path": path, "headers": headers, "method": method, "root_path": ""}
        asyncio.run(KeyCheck(app, digests)(scope, None, send))
        return sent[0]["status"]

    assert status("/v1/models", b"Bearer first") == status("/v1/models", b"bearer second") == 200
    assert status("/v1/models") == status("/v1/models", b"Bearer third") == status("/v1/completions", b"Basic first") == 401
    assert status("/health") == status("/metrics") == status("/v1/models", digests=()) == status("/v1/x", method="OPTIONS") == 200
    file.write_text("\n")
    for nothing in (file, tmp_path / "none"):
        with pytest.raises(ConfigError, match="api_key_file"):
            key_digests(str(nothing))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UnknownModel("a", "b"), 404),
        (ConfigError("stop", "x"), 400),
        (EngineBusy(3), 503),
        (EngineFailed("x"), 500),
        (KeyRefused(), 401),
        (BodyRefused(413, "x"), 413),
    ],
)
def test_errors_have_a_status_and_openais_shape(error, status):
    got, body = error_response(pickle.loads(pickle.dumps(error)))
    assert got == status and body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"] == str(error)
