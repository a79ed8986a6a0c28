"""OpenAI's requests on an engine: what is asked is done or refused by name, and streams say what whole answers say."""

import asyncio
import json
import time

import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from pydantic import ValidationError
from small_models import tiny_config
from transformers import AutoModelForCausalLM

from puzzle_ray.errors import ConfigError, PuzzleError
from puzzle_ray.serving.engine import Engine
from puzzle_ray.serving.generation import EngineBusy, EngineFailed
from puzzle_ray.serving.openai_api import OpenAIService, ServedModel
from puzzle_ray.serving.prompts import Prompts, TokenTexts
from puzzle_ray.serving.requests import ChatRequest, CompletionRequest

ASK = {"model": "tiny", "prompt": "some text", "temperature": 0, "max_tokens": 9, "ignore_eos": True}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "ignore_eos": True}


def tiny_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(vocab_size=VOCAB_SIZE, initializer_range=0.3))


class Served:
    """A service of one tiny model, and what it is made of."""

    def __init__(self, engine: Engine, tokenizer) -> None:
        self.engine, self.tokenizer, self.model = engine, tokenizer, ServedModel("tiny", engine, tokenizer)
        self.api = OpenAIService([self.model], stream_interval_s=0.0)


@pytest.fixture(scope="module")
def service():
    tokenizer = byte_tokenizer()
    with Engine(tiny_model(), tokenizer, max_batch_size=4, max_waiting=16) as engine:
        yield Served(engine, tokenizer)


@pytest.fixture
def chat_template(service):
    service.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'wizard' %}{{ raise_exception('no wizards') }}{% endif %}"
        "[{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    yield
    service.tokenizer.chat_template = None


def answer(service, request):
    return asyncio.run(service.api.answer(request))


def submit(service, request):
    return asyncio.run(service.api.submit(request))


def events(service, request):
    async def read():
        return [event async for event in await service.api.answer_stream(request)]

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
    counts = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
    assert one["usage"] == {**counts, "prompt_tokens_details": {"cached_tokens": 0}}
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
        submit(service, ChatRequest(**CHAT | {"messages": [{"role": "wizard", "content": "x"}]}))


def test_without_a_template_there_is_no_chat(service):
    with pytest.raises(ConfigError, match="use /v1/completions"):
        submit(service, ChatRequest(**CHAT))


def test_content_in_parts_and_names_reach_the_template(service, chat_template):
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "you"}]
    turns = [
        {"role": "user", "name": "ann", "content": parts},
        {"role": "assistant", "content": "hi", "tool_calls": None, "refusal": None},
    ]
    request = ChatRequest(**CHAT | {"messages": turns})
    text = "[user ann] hello\nyou\n[assistant] hi\n[assistant] "
    assert service.model.prompts.read(request) == [service.tokenizer(text).input_ids]
    for wrong, said in (
        ({"type": "image_url", "image_url": {"url": "x"}}, "'image_url' is not supported"),
        ({"type": "text"}, "text"),
    ):
        with pytest.raises((ConfigError, ValidationError), match=said):
            ChatRequest(**CHAT | {"messages": [{"role": "user", "content": [wrong]}]})
    with pytest.raises(ConfigError, match="tool_calls"):
        ChatRequest(**CHAT | {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]})


def test_several_choices_have_seeds_of_their_own_and_the_first_has_the_requests(service):
    asked = ASK | {"temperature": 1.0, "seed": 5, "prompt": ["some text", "other"]}
    one, three = answer(service, CompletionRequest(**asked)), answer(service, CompletionRequest(**asked, n=3))
    texts = [choice["text"] for choice in three["choices"]]
    assert [choice["index"] for choice in three["choices"]] == list(range(6))
    assert [texts[0], texts[3]] == [choice["text"] for choice in one["choices"]]
    assert len(set(texts)) == 6
    assert (three["usage"]["prompt_tokens"], three["usage"]["completion_tokens"]) == (14, 6 * 9)


def test_the_best_of_several_are_the_likeliest(service):
    asked = ASK | {"temperature": 1.0, "seed": 5, "logprobs": 0}
    every = answer(service, CompletionRequest(**asked, n=5))["choices"]
    ranked = sorted(every, key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
    two = answer(service, CompletionRequest(**asked, n=2, best_of=5))["choices"]
    assert [choice["text"] for choice in two] == [choice["text"] for choice in ranked[:2]]
    plain = answer(service, CompletionRequest(**asked | {"logprobs": None}, n=2, best_of=5))["choices"]
    assert [choice["text"] for choice in plain] == [choice["text"] for choice in two] and plain[0]["logprobs"] is None


def test_a_prompt_is_echoed_and_scored_as_the_model_scores_it(service):
    ids = service.tokenizer("some text").input_ids
    scored = answer(service, CompletionRequest(**ASK | {"max_tokens": 1, "echo": True, "logprobs": 2, "prompt": ids}))["choices"][
        0
    ]
    with torch.no_grad():
        truth = tiny_model()(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = scored["logprobs"]
    assert scored["text"].startswith("some text") and found["tokens"][:9] == list("some text")
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    expected = [float(truth[position - 1, ids[position]]) for position in range(1, 9)]
    assert found["token_logprobs"][1:9] == pytest.approx(expected, abs=1e-4)
    assert all(text in top for text, top in zip(found["tokens"][1:], found["top_logprobs"][1:], strict=True))
    assert found["text_offset"][:9] == list(range(9)) and len(found["tokens"]) == 10
    nothing_new = answer(service, CompletionRequest(**ASK | {"max_tokens": 0, "echo": True, "logprobs": 1}))
    assert nothing_new["choices"][0]["text"] == "some text" and len(nothing_new["choices"][0]["logprobs"]["tokens"]) == 9
    assert nothing_new["usage"]["completion_tokens"] == 0
    assert answer(service, CompletionRequest(**ASK | {"max_tokens": 0, "echo": True}))["choices"][0]["logprobs"] is None


def test_an_echo_has_the_text_without_the_tokens_that_stand_before_it(service):
    ids = [0, *service.tokenizer("some text").input_ids]
    (choice,) = answer(service, CompletionRequest(**ASK | {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}))[
        "choices"
    ]
    assert choice["text"] == "some text" and choice["logprobs"]["tokens"] == ["<s>", *"some text"]
    assert choice["logprobs"]["text_offset"] == [0, *range(9)]


def test_a_request_that_names_no_limit_gets_what_fits(service):
    asked = {name: value for name, value in ASK.items() if name != "max_tokens"}
    for length, tokens in ((100, 16), (120, 8), (127, 1)):
        found = answer(service, CompletionRequest(**asked | {"prompt": ["x" * length, "x"]}))
        assert found["usage"]["completion_tokens"] == tokens + 16
    with pytest.raises(ConfigError, match="prompt: has 128 tokens"):
        submit(service, CompletionRequest(**asked | {"prompt": "x" * 128}))
    with pytest.raises(ConfigError, match="max_tokens: is 16"):
        submit(service, CompletionRequest(**asked | {"prompt": "x" * 120, "max_tokens": 16}))


@pytest.mark.parametrize("echo", [False, True])
def test_streamed_log_probabilities_are_those_of_the_whole_answer(service, echo):
    asked = ASK | {"logprobs": 3, "echo": echo}
    (whole,) = answer(service, CompletionRequest(**asked))["choices"]
    parts = [part["choices"][0] for part in chunks(service, CompletionRequest(**asked, stream=True))]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [value for part in parts for value in part["logprobs"][name]] == whole["logprobs"][name]


def test_chat_log_probabilities_have_texts_and_bytes(service, chat_template):
    whole = answer(service, ChatRequest(**CHAT, max_tokens=4, logprobs=True, top_logprobs=2))["choices"][0]
    entries = whole["logprobs"]["content"]
    assert len(entries) == 4 and all(len(entry["top_logprobs"]) == 2 for entry in entries)
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in entries)
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode("utf-8", "replace") == whole["message"]["content"]


def test_tokens_that_are_no_character_are_written_in_bytes():
    tokenizer = byte_tokenizer()
    texts = TokenTexts(tokenizer)
    ids = tokenizer("é a").input_ids
    assert [texts.text(token_id) for token_id in ids] == ["bytes:\\xc3", "bytes:\\xa9", " ", "a"]
    assert [texts.raw(token_id) for token_id in ids] == [[0xC3], [0xA9], [0x20], [0x61]]


def test_settings_of_the_request_reach_the_sampler(service):
    fields = {
        "top_k": 3, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1,
        "stop_token_ids": [7], "logit_bias": {"65": -100}, "stop": "x",
    }  # fmt: skip
    (params,) = CompletionRequest(**ASK | fields).sampling_params()
    assert (params.top_k, params.min_p, params.presence_penalty, params.frequency_penalty) == (3, 0.1, 0.5, -0.5)
    assert (params.repetition_penalty, params.stop_token_ids, params.logit_bias) == (1.1, (7,), ((65, -100.0),))
    first = answer(service, CompletionRequest(**ASK))["choices"][0]["text"]
    banned = service.tokenizer(first[0]).input_ids[0]
    other = answer(service, CompletionRequest(**ASK, logit_bias={str(banned): -100}))["choices"][0]["text"]
    assert first[0] not in other
    stopped = answer(service, CompletionRequest(**ASK, stop_token_ids=[banned]))
    assert stopped["choices"][0]["finish_reason"] == "stop" and stopped["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"prompt": []}, "prompt: is empty"), ({"prompt": ""}, "prompt: is empty"), ({"prompt": [[]]}, "prompt: is empty"),
     ({"stop": ["a"] * 33}, "stop: holds 33"), ({"max_tokens": 0}, "max_tokens: is 0"), ({"max_tokens": 1000}, "give at most"),
     ({"prompt": ["fine", [1]]}, "prompt"), ({"model": "other"}, "no model 'other'"), ({"prompt": "\ud800"}, "surrogate"),
     ({"prompt": "a" * 10**6}, "prompt: has 1000000 characters"), ({"prompt": ["a"] * 5, "n": 4}, "at most 16 may wait"),
     ({"prompt": [10**30]}, "out of range"), ({"logit_bias": {"300": 1}}, "logit_bias"), ({"stop_token_ids": [-1]}, "stop_token_ids")],
)  # fmt: skip
def test_requests_that_cannot_be_served_start_nothing(service, fields, said):
    finished = service.engine.stats().finished
    with pytest.raises((PuzzleError, ValidationError), match=said):
        submit(service, CompletionRequest(**ASK | fields))
    assert service.engine.stats().running == service.engine.stats().waiting == 0
    assert service.engine.stats().finished == finished


def test_too_many_prompts_are_refused_before_one_is_tokenised(service, monkeypatch):
    monkeypatch.setattr(service.model.prompts, "read", lambda request: pytest.fail("read"))
    with pytest.raises(ConfigError, match="asks for 200000 answers"):
        submit(service, CompletionRequest(**ASK | {"prompt": ["a"] * 10**5, "n": 2}))


def test_whatever_a_template_raises_is_the_requests_error(service, monkeypatch):
    monkeypatch.setattr(service.tokenizer, "chat_template", "{{ messages | length // 0 }}", raising=False)
    with pytest.raises(ConfigError, match="messages: the model's chat template refuses them"):
        submit(service, ChatRequest(**CHAT))


def test_several_prompts_are_taken_together_or_not_at_all(service):
    engine = Engine(tiny_model(), service.tokenizer, max_waiting=3)
    crowded = Served(engine, service.tokenizer)
    waiting = submit(crowded, CompletionRequest(**ASK | {"prompt": ["a", "b"]}))
    with pytest.raises(EngineBusy, match="2 requests wait"):
        submit(crowded, CompletionRequest(**ASK | {"prompt": ["a", "b"]}))
    with pytest.raises(ConfigError, match="asks for 4 answers, and at most 3 may wait"):  # waiting would not help
        submit(crowded, CompletionRequest(**ASK | {"prompt": ["a"], "n": 4}))
    with engine:
        assert [generation.result(60).finish_reason for generation in waiting] == ["length"] * 2
    assert (engine.stats().finished, engine.stats().generated_tokens) == (2, 18)


def test_the_model_may_be_left_out_where_there_is_one(service):
    nameless = {name: value for name, value in ASK.items() if name != "model"}
    assert answer(service, CompletionRequest(**nameless))["model"] == "tiny"
    both = OpenAIService([service.model, ServedModel("other", service.engine, service.tokenizer)])
    assert [card["id"] for card in both.models()["data"]] == ["tiny", "other"]
    assert asyncio.run(both.answer(CompletionRequest(**ASK | {"model": "other"})))["model"] == "other"
    with pytest.raises(ConfigError, match="model: is missing; name one of 'tiny', 'other'"):
        asyncio.run(both.submit(CompletionRequest(**nameless)))


def test_tokenising_does_not_hold_up_the_event_loop(service):
    """While a tokenizer takes its time, the loop goes on; so it does while more texts wait for one than may."""
    prompts = Prompts(service.tokenizer, 128)

    async def run():
        def slow():
            while not released:
                time.sleep(0.001)

        released, works = [], [asyncio.create_task(prompts._run(slow)) for _ in range(64)]
        await asyncio.sleep(0)
        with pytest.raises(EngineBusy):
            await prompts.token_ids(CompletionRequest(prompt="x"))
        released.append(True)
        await asyncio.gather(*works)
        return await prompts.token_ids(CompletionRequest(prompt="x"))

    assert asyncio.run(asyncio.wait_for(run(), 60)) == [service.tokenizer("x").input_ids]


def test_metrics_are_what_prometheus_reads_and_what_was_done():
    tokenizer = byte_tokenizer()
    with Engine(tiny_model(), tokenizer) as engine:
        served = Served(engine, tokenizer)
        for _ in range(3):
            answer(served, CompletionRequest(**ASK))
        text = served.api.metrics({"replica": 'a"b'})
    samples = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            samples[name] = float(value)
    labels = 'replica="a\\"b",model="tiny"'
    assert samples[f"puzzle_ray_generation_tokens_total{{{labels}}}"] == 27
    assert samples[f'puzzle_ray_requests_total{{{labels},ending="length"}}'] == 3
    assert samples[f"puzzle_ray_requests_waiting{{{labels}}}"] == samples[f"puzzle_ray_requests_running{{{labels}}}"] == 0
    for name in ("time_to_first_token_seconds", "time_per_output_token_seconds", "request_seconds"):
        assert samples[f"puzzle_ray_{name}_count{{{labels}}}"] == samples[f'puzzle_ray_{name}_bucket{{{labels},le="+Inf"}}'] == 3
    helped = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(helped) == len(set(helped))


def test_a_failure_in_mid_stream_is_the_last_event(service):
    engine = Engine(tiny_model(), service.tokenizer)
    request = CompletionRequest(**ASK, stream=True)
    failing = Served(engine, service.tokenizer)

    async def read():
        stream = await failing.api.answer_stream(request)
        engine.close()
        return [event async for event in stream]

    error, done = asyncio.run(read())
    assert "the engine is closed" in json.loads(error.removeprefix("data: "))["error"]["message"] and done == "data: [DONE]\n\n"
    with pytest.raises(EngineFailed):
        failing.api.health()


@pytest.mark.parametrize("begun", [False, True])
def test_a_stream_that_is_closed_frees_its_slot_whether_it_was_read_or_not(service, begun):
    async def run():
        before = service.engine.stats().finished
        stream = await service.api.answer_stream(CompletionRequest(**ASK | {"max_tokens": 119}, stream=True))
        (generation,) = stream.ag_frame.f_locals["generations"]
        if begun:
            await anext(stream)
        await stream.aclose()
        assert generation.cancelled
        while service.engine.stats().finished == before:
            await asyncio.sleep(0.01)

    asyncio.run(run())


def test_where_many_streams_run_each_has_fewer_events(service):
    api = OpenAIService([service.model], stream_interval_s=0.02)

    async def run():
        streams = [await api.answer_stream(CompletionRequest(**ASK, stream=True)) for _ in range(10)]
        assert api._interval_s() == 0.02
        for stream in streams:
            await anext(stream)
        assert api._interval_s() == pytest.approx(10 / 200)
        for stream in streams:
            await stream.aclose()

    asyncio.run(run())
    assert api._interval_s() == 0.02


def test_what_comes_faster_than_the_interval_is_one_event(service):
    slow = OpenAIService([service.model], stream_interval_s=3600.0)
    service_of = Served(service.engine, service.tokenizer)
    service_of.api = slow
    parts = chunks(service_of, CompletionRequest(**ASK, stream=True))
    assert len(parts) <= 3  # the first token, at most some that came with it, and at the end all others at once
    assert (
        "".join(part["choices"][0]["text"] for part in parts) == answer(service, CompletionRequest(**ASK))["choices"][0]["text"]
    )
