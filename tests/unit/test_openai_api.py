"""OpenAI's requests on an engine: what is asked is done or refused by name, and streams say what whole answers say."""

import asyncio
import json
import pickle
import time
from pathlib import Path

import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from pydantic import ValidationError
from small_models import tiny_config
from transformers import AutoModelForCausalLM

from puzzle_ray.errors import ConfigError, PuzzleError
from puzzle_ray.serving.engine import Engine
from puzzle_ray.serving.fetch import check_model, fetch_model
from puzzle_ray.serving.generation import EngineBusy, EngineFailed
from puzzle_ray.serving.openai_api import (
    ChatRequest,
    CompletionRequest,
    OpenAIService,
    UnknownModel,
    error_response,
    validation_body,
)

ASK = {"model": "tiny", "prompt": "some text", "temperature": 0, "max_tokens": 9, "ignore_eos": True}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "ignore_eos": True}


def tiny_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(vocab_size=VOCAB_SIZE, initializer_range=0.3))


@pytest.fixture(scope="module")
def service():
    tokenizer = byte_tokenizer()
    with Engine(tiny_model(), tokenizer, max_batch_size=4, max_waiting=4) as engine:
        yield OpenAIService(engine, tokenizer, "tiny")


@pytest.fixture
def chat_template(service):
    service.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'wizard' %}{{ raise_exception('no wizards') }}{% endif %}"
        "[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    yield
    service.tokenizer.chat_template = None


def answer(service, request):
    return asyncio.run(service.answer(request))


def events(service, request):
    async def read():
        return [event async for event in service.answer_stream(request)]

    return asyncio.run(read())


def chunks(service, request):
    *bodies, done = events(service, request)
    assert done == "data: [DONE]\n\n"
    assert all(body.startswith("data: {") and body.endswith("}\n\n") and body.count("\n") == 2 for body in bodies)
    return [json.loads(body.removeprefix("data: ")) for body in bodies]


def test_every_form_of_prompt_gives_the_same_answer(service):
    ids = service.tokenizer("some text").input_ids
    one = answer(service, CompletionRequest(**ASK))
    assert one["object"] == "text_completion" and one["model"] == "tiny" and one["id"].startswith("cmpl-")
    assert one["usage"] == {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
    assert one["choices"] == [{**one["choices"][0], "index": 0, "finish_reason": "length", "logprobs": None}]
    for prompt in [ids, ["some text"], [ids]]:
        assert answer(service, CompletionRequest(**ASK | {"prompt": prompt}))["choices"] == one["choices"]
    both = answer(service, CompletionRequest(**ASK | {"prompt": ["other", "some text"]}))
    assert both["choices"][1] == one["choices"][0] | {"index": 1}
    assert both["usage"]["total_tokens"] == 9 + 9 + 5 + 9


def test_a_stream_says_what_the_whole_answer_says(service):
    asked = ASK | {"prompt": ["some text", "other"]}
    whole = answer(service, CompletionRequest(**asked))
    streamed = chunks(service, CompletionRequest(**asked, stream=True, stream_options={"include_usage": True}))
    *parts, last = streamed
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(part["usage"] is None for part in parts)
    assert len({(part["id"], part["created"], part["object"]) for part in streamed}) == 1
    for choice in whole["choices"]:
        mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert "".join(each["text"] for each in mine) == choice["text"]
        assert [each["finish_reason"] for each in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]


def test_chat_follows_the_models_template(service, chat_template):
    text = "[user] hello\n[assistant] "
    whole = answer(service, ChatRequest(**CHAT, max_completion_tokens=9))
    plain = answer(service, CompletionRequest(**ASK | {"prompt": text}))
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": plain["choices"][0]["text"]}
    assert (whole["object"], whole["usage"]) == ("chat.completion", plain["usage"])
    streamed = chunks(service, ChatRequest(**CHAT, max_tokens=9, stream=True))
    deltas = [part["choices"][0]["delta"] for part in streamed]
    assert streamed[0]["object"] == "chat.completion.chunk"
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta["content"] for delta in deltas) == plain["choices"][0]["text"]
    unlimited = answer(service, ChatRequest(**CHAT))
    assert unlimited["usage"]["total_tokens"] == service.engine.max_length
    with pytest.raises(ConfigError, match="no wizards"):
        service.submit(ChatRequest(**CHAT | {"messages": [{"role": "wizard", "content": "x"}]}))


def test_without_a_template_there_is_no_chat(service):
    with pytest.raises(ConfigError, match="use /v1/completions"):
        service.submit(ChatRequest(**CHAT))


def test_null_and_neutral_fields_change_nothing(service):
    nulls = dict.fromkeys(["top_p", "top_k", "seed", "stop", "stream", "stream_options", "user", "logprobs", "n"])
    neutral = {"n": 1, "best_of": 1, "echo": False, "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}}
    assert CompletionRequest(**ASK, **nulls) == CompletionRequest(**ASK, **neutral) == CompletionRequest(**ASK)
    assert CompletionRequest(model="tiny", prompt="x").sampling_params().max_tokens == 16


UNSUPPORTED = {
    "n": 2, "echo": True, "logprobs": 1, "presence_penalty": 0.5, "logit_bias": {"5": 1}, "suffix": "x", "best_of": 3,
    "stream_options": {"include_usage": True},
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), UNSUPPORTED.items())
def test_what_is_not_supported_is_refused_by_name(field, value):
    with pytest.raises(ConfigError) as caught:
        CompletionRequest(**ASK | {field: value})
    status, body = error_response(caught.value)
    assert (status, body["error"]["param"]) == (400, field)


@pytest.mark.parametrize(("field", "value"), [("tempreature", 1), ("prompt", 3.5), ("prompt", None), ("max_tokens", "many")])
def test_malformed_bodies_name_the_field(field, value):
    with pytest.raises(ValidationError) as caught:
        CompletionRequest(**ASK | {field: value})
    error = validation_body(caught.value.errors())["error"]
    assert error["param"] == field and error["message"].startswith(field) and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"prompt": []}, "prompt: is empty"), ({"prompt": ""}, "prompt: is empty"), ({"prompt": [[]]}, "prompt: is empty"),
     ({"stop": list("abcde")}, "stop: holds 5"), ({"max_tokens": 0}, "max_tokens: is 0"), ({"max_tokens": 1000}, "give at most"),
     ({"prompt": ["fine", [1]]}, "prompt"), ({"model": "other"}, "no model 'other'")],
)  # fmt: skip
def test_requests_that_cannot_be_served_start_nothing(service, fields, said):
    finished = service.engine.stats().finished
    with pytest.raises((PuzzleError, ValidationError), match=said):
        service.submit(CompletionRequest(**ASK | fields))
    assert service.engine.stats().running == service.engine.stats().waiting == 0
    assert service.engine.stats().finished == finished


def test_several_prompts_are_taken_together_or_not_at_all(service):
    engine = Engine(tiny_model(), service.tokenizer, max_waiting=2)
    crowded = OpenAIService(engine, service.tokenizer, "tiny")
    with pytest.raises(EngineBusy):
        crowded.submit(CompletionRequest(**ASK | {"prompt": ["a", "b", "c"]}))
    with engine:
        while engine.stats().waiting:  # the first two are dropped when the engine comes to them
            time.sleep(0.001)
        answer(crowded, CompletionRequest(**ASK))
    assert (engine.stats().finished, engine.stats().generated_tokens) == (3, 9)


@pytest.mark.parametrize(
    ("error", "status"),
    [(UnknownModel("a", "b"), 404), (ConfigError("stop", "x"), 400), (EngineBusy(3), 503), (EngineFailed("x"), 500)],
)
def test_errors_have_a_status_and_openais_shape(error, status):
    got, body = error_response(pickle.loads(pickle.dumps(error)))
    assert got == status and body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"] == str(error)


def test_a_failure_in_mid_stream_is_the_last_event(service):
    engine = Engine(tiny_model(), service.tokenizer)
    request = CompletionRequest(**ASK, stream=True)
    failing = OpenAIService(engine, service.tokenizer, "tiny")

    async def read():
        stream = failing.answer_stream(request)
        engine.close()
        return [event async for event in stream]

    error, done = asyncio.run(read())
    assert "the engine is closed" in json.loads(error.removeprefix("data: "))["error"]["message"] and done == "data: [DONE]\n\n"
    with pytest.raises(EngineFailed):
        failing.health()


def test_a_model_is_fetched_from_a_path_or_a_url(tmp_path, parent_folder):
    assert fetch_model(check_model(str(parent_folder))) == str(parent_folder)
    url = f"file://{parent_folder}"
    fetched = fetch_model(check_model(url))
    assert fetched != str(parent_folder)
    names = {path.name: path.read_bytes() for path in parent_folder.iterdir()}
    assert {path.name: path.read_bytes() for path in Path(fetched).iterdir()} == names
    for nowhere in [str(tmp_path / "none"), str(tmp_path), f"file://{tmp_path}", "nosuch://x/y"]:
        with pytest.raises(PuzzleError, match="name a|name an"):
            check_model(nowhere)
