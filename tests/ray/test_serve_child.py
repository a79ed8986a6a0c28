"""A child behind Ray Serve, as OpenAI's own client sees it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from ray import serve
from small_models import tiny_config

from actors.child_server import ChildServer
from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.models.child import load_model, new_child
from puzzle_ray.serving.text import TextStream

ROOT = Path(__file__).parents[2]
CHOICES = [LayerChoice("noop", "parent"), LayerChoice("gqa:1", "ffn:24"), LayerChoice("linear", "noop")]
MAX_LENGTH = 8192  # an answer that long takes many seconds, far more than it takes to notice that nobody reads it
WAIT_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def child_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("child")
    torch.manual_seed(0)
    config = tiny_config(vocab_size=VOCAB_SIZE, max_position_embeddings=MAX_LENGTH, initializer_range=0.3)
    new_child(config, CHOICES, torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(local_ray, child_folder):
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    server = ChildServer.options(max_ongoing_requests=32).bind(
        str(child_folder), model_name="tiny", device="cpu", dtype="auto", max_batch_size=4, max_length=None, max_waiting=8
    )
    serve.run(server, name="under-test", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as client:
        yield client


def health_when_idle(url: str, finished: int = 0) -> dict:
    """The engine's counters once nothing is in work and at least that many requests have ended."""
    deadline = time.monotonic() + WAIT_S
    while True:
        with urllib.request.urlopen(f"{url}/health", timeout=WAIT_S) as response:
            now = json.load(response)
        if now["running"] == now["waiting"] == 0 and now["finished"] >= finished:
            return now
        assert time.monotonic() < deadline, f"still at work: {now}"
        time.sleep(0.05)


def test_answers_are_those_of_generate_however_many_ask_at_once(client, child_folder):
    model, tokenizer = load_model(child_folder), byte_tokenizer()
    prompts = ["a", "some text", "é€😀", "some more text than before", "b", "c"]

    asked = {"model": "tiny", "max_tokens": 24, "temperature": 0, "extra_body": {"ignore_eos": True}}
    model.generation_config.eos_token_id = None

    def ask(prompt):
        return client.completions.create(prompt=prompt, **asked)

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, prompts))
    for prompt, got in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**ids, do_sample=False, max_new_tokens=24, pad_token_id=0)[0, ids.input_ids.shape[1] :]
        text = TextStream(tokenizer, ids.input_ids[0].tolist())
        assert got.choices[0].text == "".join(text.push(token_id) for token_id in tokens.tolist()) + text.finish()
        assert got.usage.completion_tokens == 24 and got.choices[0].finish_reason == "length"


def test_the_official_client_lists_streams_and_reads_usage(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    asked = {"model": "tiny", "prompt": ["one", "two"], "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked)
    *parts, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert last.usage == whole.usage
    for choice in whole.choices:
        mine = [part.choices[0] for part in parts if part.choices[0].index == choice.index]
        assert ("".join(part.text for part in mine), mine[-1].finish_reason) == (choice.text, choice.finish_reason)


def test_errors_arrive_as_openais(client, url):
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.completions.create(model="other", prompt="x")
    for field, value in [("n", 2), ("max_tokens", MAX_LENGTH), ("prompt", []), ("temperature", -1)]:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**{"model": "tiny", "prompt": "x", field: value})
        assert caught.value.param == field
    with pytest.raises(openai.BadRequestError, match="wizardry: unknown"):
        client.completions.create(model="tiny", prompt="x", stream=True, extra_body={"wizardry": 1})
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="tiny", prompt=["x"] * 40)
    assert (caught.value.status_code, caught.value.code) == (503, "engine_busy")
    for path, status in [("/nowhere", 404), ("/v1/completions", 405)]:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(url + path, timeout=WAIT_S)
        assert caught.value.code == status and path in json.load(caught.value)["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(client, url, stream):
    before = health_when_idle(url)
    asked = {"model": "tiny", "prompt": "x", "max_tokens": MAX_LENGTH - 1, "stream": stream, "extra_body": {"ignore_eos": True}}
    if stream:
        with client.completions.create(**asked) as events:
            next(iter(events))
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).completions.create(**asked)
    after = health_when_idle(url, before["finished"] + 1)
    assert after["generated_tokens"] - before["generated_tokens"] < MAX_LENGTH - 1


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "jobs.serve_child", *options]


def test_the_job_serves_until_it_is_told_to_stop(child_folder):
    port = free_port()
    options = ["--child", str(child_folder), "--port", str(port), "--served-model-name", "mine", "--max-length", "64"]
    pipe, environment = subprocess.PIPE, os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command(*options), cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=environment)
    try:
        line = job.stdout.readline()
        assert f"http://127.0.0.1:{port}/v1" in line and "curl" in line, job.stderr.read()
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            assert client.completions.create(model="mine", prompt="some text", max_tokens=4).usage.completion_tokens <= 4
        job.send_signal(signal.SIGTERM)
        assert job.wait(WAIT_S) == 0
    finally:
        job.kill()
        job.communicate()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_the_job_says_in_one_line_what_is_wrong(child_folder, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for options, said in [
            (["--child", str(tmp_path / "none")], "there is no folder"),
            (["--child", str(child_folder), "--port", port], f"127.0.0.1:{port} cannot be had (Address already in use)"),
            (["--child", str(child_folder), "--dtype", "float3"], "dtype: is 'float3'"),
        ]:
            done = subprocess.run(command(*options), cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)
            assert done.returncode == 2
            assert done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") == 1
