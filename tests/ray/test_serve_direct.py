"""A server whose only replica listens itself, when something happens to it or to its port."""

import contextlib
import http.client
import json
import socket
import threading
import urllib.error
import urllib.request

import psutil
import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from ray import serve
from small_models import tiny_config
from transformers import AutoModelForCausalLM
from waiting import until

from jobs.serve_child import Stops, deployed, wait_until_running
from puzzle_ray.errors import ClusterError
from puzzle_ray.serving.settings import ServeSettings

NAME, WAIT_S = "direct", 240.0


@pytest.fixture(scope="module")
def settings(local_ray, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(vocab_size=VOCAB_SIZE, max_position_embeddings=8192)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    yield ServeSettings(models={"tiny": str(folder)}, max_batch_size=2, kv_cache_mib=32, grace_period_s=1.0)
    serve.shutdown()


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(port: int, tokens: int = 2) -> int:
    """The status of a request; 0 where nobody answers."""
    body = json.dumps({"prompt": "x", "max_tokens": tokens, "ignore_eos": True}).encode()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/completions", body, timeout=WAIT_S) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return 0


def test_after_a_replica_was_killed_another_listens_on_the_same_port_and_in_the_end_none(settings, port):
    """A connection is open while it is killed, whose end then keeps the port for a minute from those who do not know better."""
    with deployed(settings, NAME, "/", ("127.0.0.1", port), True, Stops()):
        assert wait_until_running(NAME, WAIT_S, threading.Event(), proxied=False)
        assert not serve.status().proxies and ask(port) == 200
        second = deployed(settings, "second", "/second", ("127.0.0.1", port + 1), False, Stops())
        with pytest.raises(ClusterError, match=f"no proxy: {NAME} listens itself"), second:
            pass
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)) as open_one:
            open_one.request("GET", "/health")
            assert open_one.getresponse().read()  # so it was accepted: it stays open, and ends as one that nothing is left on
            replica = next(
                each
                for each in psutil.Process().children(recursive=True)
                if each.status() != psutil.STATUS_ZOMBIE and f"ServeReplica:{NAME}" in " ".join(each.cmdline())
            )
            replica.kill()
            assert open_one.sock.recv(1) == b""
        until(lambda: ask(port) == 200, "another replica answers")
    assert ask(port) == 0


def test_a_port_that_is_taken_meanwhile_is_told(settings):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = f"port: 127.0.0.1:{port} cannot be had .Address already in use."
        with deployed(settings, "late", "/", ("127.0.0.1", port), True, Stops()), pytest.raises(ClusterError, match=said):
            wait_until_running("late", WAIT_S, threading.Event(), proxied=False)
