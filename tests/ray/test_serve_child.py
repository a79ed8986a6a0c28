"""A child behind Ray Serve, as OpenAI's own client sees it."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from ray import serve
from small_models import tiny_config
from waiting import until

from actors.direct_http import Where
from actors.serve import application, start_serve
from jobs import app
from jobs.serve_child import Stops, deployed, wait_until_running
from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.errors import ConfigError
from puzzle_ray.models.child import load_model, new_child
from puzzle_ray.serving.settings import ServeSettings
from puzzle_ray.serving.text import TextStream

ROOT = Path(__file__).parents[2]
CHOICES = [LayerChoice("noop", "parent"), LayerChoice("gqa:1", "ffn:24"), LayerChoice("linear", "noop")]
MAX_LENGTH = 8192  # an answer that long takes many seconds, far more than it takes to notice that nobody reads it
WAIT_S = 240.0


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


@pytest.fixture(scope="module", params=["proxied", "direct"])
def url(request, local_ray, child_folder):
    """Of a server behind Serve's proxy, and of one whose replica listens itself."""
    proxied, where = request.param == "proxied", Where("127.0.0.1", free_port(), "/here")
    start_serve(where.host, where.port, proxied)
    key = hashlib.sha256(b"secret").hexdigest()
    settings = ServeSettings(
        models={"tiny": str(child_folder), "twin": str(child_folder)},
        max_batch_size=4, max_waiting=8, kv_cache_mib=64, max_body_mib=0.5, api_key_sha256=(key,), allowed_origins=("http://page",),
    )  # fmt: skip
    serve.run(application(settings, None if proxied else where), name="under-test", route_prefix="/here")
    yield f"http://127.0.0.1:{where.port}/here"
    serve.shutdown()


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0, timeout=WAIT_S) as client:
        yield client


def health_when_idle(url: str, finished: int = 0) -> dict:
    """The engine's counters once nothing is in work and at least that many requests have ended."""
    deadline = time.monotonic() + WAIT_S
    while True:
        with urllib.request.urlopen(f"{url}/health", timeout=WAIT_S) as response:
            now = json.load(response)["models"]["tiny"]
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
    assert [model.id for model in client.models.list()] == ["tiny", "twin"]
    assert client.models.retrieve("twin").id == "twin"
    asked = {"model": "tiny", "prompt": ["one", "two"], "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked)
    *parts, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert last.usage == whole.usage
    for choice in whole.choices:
        mine = [part.choices[0] for part in parts if part.choices[0].index == choice.index]
        assert ("".join(part.text for part in mine), mine[-1].finish_reason) == (choice.text, choice.finish_reason)
    twin = client.completions.create(**asked | {"model": "twin", "logprobs": 2, "echo": True})
    assert [choice.text for choice in twin.choices] == [
        prompt + choice.text for prompt, choice in zip(asked["prompt"], whole.choices, strict=True)
    ]
    assert twin.choices[0].logprobs.tokens[:3] == list("one") and twin.choices[0].logprobs.token_logprobs[0] is None


def asked_plainly(url, body=None, key="secret", **headers):
    """Status, headers and body of a request without a client of OpenAI's."""
    request = urllib.request.Request(url, data=body, headers={"Authorization": f"Bearer {key}"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_errors_arrive_as_openais(client, url):
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")
    for field, value in [("n", 10**6), ("max_tokens", MAX_LENGTH), ("prompt", []), ("temperature", -1), ("prompt", ["x"] * 40)]:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**{"model": "tiny", "prompt": "x", field: value})
        assert caught.value.param == field
    with pytest.raises(openai.BadRequestError, match="wizardry: unknown"):
        client.completions.create(model="tiny", prompt="x", stream=True, extra_body={"wizardry": 1})
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    for path, status in [("/nowhere", 404), ("/v1/completions", 405)]:
        code, headers, body = asked_plainly(url + path)
        assert code == status and path in json.loads(body)["error"]["message"]
        assert headers["Allow"] == ("POST" if status == 405 else None)
    for body, status in [(b"[" * 10**5, 400), (b"{" + b" " * 2**19, 413), (b'{"prompt": "\\ud800"}', 400), (b"\xff", 400)]:
        code, _, answer = asked_plainly(f"{url}/v1/completions", body, **{"Content-Type": "application/json"})
        assert code == status and json.loads(answer)["error"]["message"]


def test_a_full_server_says_when_to_come_back(client, url):
    asked = {"model": "tiny", "prompt": "x", "max_tokens": MAX_LENGTH - 1, "stream": True, "extra_body": {"ignore_eos": True}}
    streams = [client.completions.create(**asked | {"prompt": ["x"] * 4}) for _ in range(3)]
    body = json.dumps({"model": "tiny", "prompt": ["x"] * 4}).encode()
    code, headers, answer = asked_plainly(f"{url}/v1/completions", body)
    for stream in streams:
        stream.close()
    assert (code, headers["Retry-After"], json.loads(answer)["error"]["code"]) == (503, "1", "engine_busy")
    health_when_idle(url)


def test_those_who_watch_need_no_key_and_pages_only_from_their_origin(url):
    code, headers, text = asked_plainly(f"{url}/metrics", key="none")
    assert code == 200 and b'model="tiny"' in text and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert asked_plainly(f"{url}/health", key="none")[0] == 200
    assert asked_plainly(f"{url}/v1/models", Origin="http://page")[1]["Access-Control-Allow-Origin"] == "http://page"
    assert asked_plainly(f"{url}/v1/models", Origin="http://other")[1]["Access-Control-Allow-Origin"] is None


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


@pytest.mark.parametrize("url", ["proxied"], indirect=True)
def test_a_second_application_leaves_the_first_alone(client, url, child_folder):
    settings = ServeSettings(models={"second": str(child_folder)}, max_batch_size=2, kv_cache_mib=32, grace_period_s=5)
    where = ("127.0.0.1", int(url.split(":")[2].partition("/")[0]))

    def answers():
        return client.completions.create(model="tiny", prompt="x", max_tokens=1).model

    for name, prefix, said in [
        ("under-test", "/x", "name: an application 'under-test' runs"),
        ("third", "/here", "route_prefix: is '/here'"),
    ]:
        with pytest.raises(ConfigError, match=said), deployed(settings, name, prefix, where, False, Stops()):
            pass
    with deployed(settings, "second", "/second", where, False, Stops()):
        assert wait_until_running("second", WAIT_S, threading.Event())
        code, _, body = asked_plainly(f"{url.removesuffix('/here')}/second/v1/completions", b'{"prompt": "x", "max_tokens": 1}')
        assert (code, json.loads(body)["model"], answers()) == (200, "second", "tiny")
    assert list(serve.status().applications) == ["under-test"] and answers() == "tiny"


@pytest.mark.wide
@pytest.mark.parametrize("url", ["proxied"], indirect=True)
def test_a_replica_that_is_killed_takes_only_its_own_requests_with_it(client, url, child_folder):
    """Of the streams that run while one of two replicas is killed some end early; those that begin afterwards are whole."""
    settings = ServeSettings(models={"pair": str(child_folder)}, max_batch_size=8, kv_cache_mib=32, num_replicas=2)
    where, tokens = ("127.0.0.1", int(url.split(":")[2].partition("/")[0])), 4000
    with deployed(settings, "pair", "/pair", where, False, Stops()):
        assert wait_until_running("pair", WAIT_S, threading.Event())
        pair = client.with_options(base_url=f"{url.removesuffix('/here')}/pair/v1")
        asked = {"model": "pair", "prompt": "x", "max_tokens": tokens, "stream": True, "extra_body": {"ignore_eos": True}}

        def begun():
            stream = iter(pair.completions.create(**asked, stream_options={"include_usage": True}))
            next(stream)
            return stream

        def whole(stream):
            try:
                *_, last = stream
                return last.usage is not None and last.usage.completion_tokens == tokens
            except Exception:  # the connection is cut, in whatever way
                return False

        with ThreadPoolExecutor(8) as pool:
            before = list(pool.map(lambda _: begun(), range(8)))
            replicas = [
                each
                for each in psutil.Process().children(recursive=True)
                if each.status() != psutil.STATUS_ZOMBIE and "ServeReplica:pair" in " ".join(each.cmdline())
            ]
            assert len(replicas) == 2
            replicas[0].kill()
            in_progress, later = list(pool.map(whole, before)), list(pool.map(lambda _: whole(begun()), range(4)))
        assert 0 < sum(in_progress) < 8 and all(later)


def assert_loopback_alone(pid: int, port: int) -> None:
    """Nothing of the server listens elsewhere but for the port by which Serve's replicas call each other, which wants Ray's token."""
    at_port, elsewhere = [], []
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        who = " ".join(process.cmdline())
        for each in process.net_connections("inet"):
            if each.status == psutil.CONN_LISTEN:
                at_port += [who] if each.laddr.port == port else []
                elsewhere += [] if each.laddr.ip.removeprefix("::ffff:") == "127.0.0.1" else [who]
    assert len(at_port) == 1 and "ServeReplica" in at_port[0]
    assert len(elsewhere) <= 1 and all("ServeReplica" in who for who in elsewhere)


def refuses(port: int) -> bool:
    """Whether nothing listens there any more."""
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return True
    return False


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "jobs.serve_child", *options]


def test_the_job_serves_until_it_is_told_to_stop_and_finishes_what_is_in_progress(child_folder):
    port = free_port()
    options = ["--child", f"mine={child_folder}", "--port", str(port), "--max-length", "4096"]
    pipe, environment = subprocess.PIPE, os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command(*options), cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=environment)
    try:
        line = job.stdout.readline()
        assert f"http://127.0.0.1:{port}/v1" in line and "curl" in line, job.stderr.read()
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            assert client.completions.create(model="mine", prompt="some text", max_tokens=4).usage.completion_tokens <= 4
            asked = {"model": "mine", "prompt": "x", "max_tokens": 1000, "stream": True, "extra_body": {"ignore_eos": True}}
            stream = iter(client.completions.create(**asked, stream_options={"include_usage": True}))
            next(stream)
            assert_loopback_alone(job.pid, port)
            job.send_signal(signal.SIGINT)
            until(lambda: refuses(port), "nothing new is accepted")
            *_, last = stream
            assert last.usage.completion_tokens == 1000
        assert job.wait(WAIT_S) == 0
        assert job.stdout.read() == ""
    finally:
        job.kill()
        job.communicate()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_the_job_says_in_one_line_what_is_wrong(child_folder, tmp_path, capsys):
    """In a process of its own, and in this one."""
    done = subprocess.run(command("--child", str(tmp_path / "none")), cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "there is no folder" in done.stderr and done.stderr.count("\n") == 1
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for options, said in [
            (["--child", str(child_folder), "--port", port], f"127.0.0.1:{port} cannot be had (Address already in use)"),
            (["--child", str(child_folder), "--dtype", "float3"], "dtype: is 'float3'"),
            (["--child", str(child_folder), "--max-length", "9000"], "max_length: is 9000; give 2 to 8192"),
            (["--child", str(child_folder), "--child", str(child_folder)], "two models are called 'child0'"),
            (["--child", str(child_folder), "--route-prefix", "x"], "route_prefix: is 'x'"),
        ]:
            assert app.run(["serve-child", *options]) == 2
            err = capsys.readouterr().err
            assert err.startswith("error: ") and said in err and err.count("\n") == 1
