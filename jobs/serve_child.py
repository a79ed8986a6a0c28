"""Serve a child (or any Hugging Face causal LM) with OpenAI's API, on Ray Serve; loopback unless told otherwise.

python -m jobs.serve_child --child runs/child
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from jobs.command import RESULTS, Debug, Verb
from jobs.session import connected
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.errors import ClusterError, ConfigError

_APPLICATION = "puzzle-ray-child"
_DTYPES = ("auto", "float32", "bfloat16", "float16")
# Requests a replica takes on top of what its engine holds, so that /health and refusals get through at full load.
_SPARE_REQUESTS = 16


def serve_child(
    child: Annotated[str, typer.Option(help="Hugging Face folder: a path, an fsspec URL or a hub id.")],
    host: Annotated[str, typer.Option(help="Interface to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    address: Annotated[str, typer.Option(help="Ray: local (one of its own), auto, or host:port.")] = "local",
    served_model_name: Annotated[str | None, typer.Option(help="Name in requests; the folder's name if not given.")] = None,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Requests decoded together, per replica.")] = 16,
    max_length: Annotated[int, typer.Option(min=0, help="Tokens of prompt and answer; 0 is the model's own limit.")] = 0,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait, per replica; more get a 503.")] = 256,
    num_replicas: Annotated[int, typer.Option(min=1)] = 1,
    num_cpus: Annotated[int, typer.Option(min=1, help="Cores (and threads) per replica.")] = 1,
    num_gpus: Annotated[float, typer.Option(min=0, help="GPUs per replica; 0 runs on the CPU.")] = 0,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(_DTYPES)}; auto is the model's own.")] = "auto",
    start_timeout_s: Annotated[float, typer.Option(help="Give up when the replicas are not ready by then.")] = 300.0,
    debug: Debug = False,
) -> None:
    """Serve a model until SIGINT (Ctrl-C) or SIGTERM."""
    own_cluster = address == "local" and not os.environ.get("RAY_ADDRESS")
    if dtype not in _DTYPES:
        raise ConfigError("dtype", f"is {dtype!r}", f"give one of {', '.join(_DTYPES)}")
    if own_cluster:
        check_port(host, port)
    server = {
        "child": check_child(child),
        "model_name": served_model_name or child.rstrip("/").rsplit("/", 1)[-1],
        "device": "cuda" if num_gpus else "cpu",
        "dtype": dtype,
        "max_batch_size": max_batch_size,
        "max_length": max_length or None,
        "max_waiting": max_waiting,
    }
    options = {"num_replicas": num_replicas, "ray_actor_options": {"num_cpus": num_cpus, "num_gpus": num_gpus}}
    with connected(ClusterConfig(address=address)), stop_signals() as stopped:
        check_resources(num_replicas, num_cpus, num_gpus)
        with deployed(server, options, host, port, own_cluster):
            if wait_until_running(start_timeout_s, stopped):
                announce(host, port, str(server["model_name"]))
                watch(stopped)


def check_port(host: str, port: int) -> None:
    """Raises ConfigError if nothing can listen there."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ConfigError("port", f"{host}:{port} cannot be had ({error.strerror})", "give another --port or --host") from None


def check_child(child: str) -> str:
    """What the replicas load: an absolute path, a hub id or a URL. Raises ParentError when nothing is there."""
    from puzzle_ray.serving.fetch import check_model

    return check_model(child)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, in place of what they did before."""
    stopped = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_resources(num_replicas: int, num_cpus: int, num_gpus: float) -> None:
    """Raises ClusterError when the cluster can never hold the replicas: Ray itself would wait for ever."""
    import ray

    have = ray.cluster_resources()
    for kind, each in (("CPU", num_cpus), ("GPU", num_gpus)):
        if num_replicas * each > have.get(kind, 0):
            problem = f"{num_replicas} x {each:g} {kind} is more than the cluster's {have.get(kind, 0):g}"
            raise ClusterError("num_replicas", problem, f"ask for fewer replicas, or for less {kind} each")


@contextmanager
def deployed(server: dict[str, Any], options: dict[str, Any], host: str, port: int, own_cluster: bool) -> Iterator[None]:
    """The replicas, started but not waited for; gone after the block, together with Serve if it was not there before."""
    from ray import serve

    from actors.child_server import ChildServer

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = {"log_level": "WARNING"}
    was_there = bool(serve.status().proxies)
    if was_there:
        typer.echo("Serve runs on this cluster already: the host and port it was started with hold", err=True)
    elif not own_cluster:
        check_port(host, port)
    ended_well = False
    held = server["max_batch_size"] + server["max_waiting"]
    try:
        serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
        application = ChildServer.options(  # type: ignore[attr-defined]
            max_ongoing_requests=held + _SPARE_REQUESTS, max_queued_requests=held, logging_config=quiet, **options
        ).bind(**server)
        serve.run_many(
            [serve.RunTarget(target=application, name=_APPLICATION, route_prefix="/", logging_config=quiet)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        yield
        ended_well = True
    finally:
        if was_there:
            serve.delete(_APPLICATION)
        elif ended_well or not own_cluster:  # after a failure an own cluster just ends: nothing is in work
            serve.shutdown()


def wait_until_running(timeout_s: float, stopped: threading.Event) -> bool:
    """True once requests are answered, False if stopped before. Raises ClusterError."""
    from ray import serve

    deadline, message = time.monotonic() + timeout_s, ""
    while time.monotonic() < deadline:
        status = serve.status()
        application = status.applications.get(_APPLICATION)
        if application is not None:
            parts = [application.message, *(each.message for each in application.deployments.values())]
            message = next((part for part in reversed(parts) if part), "")
            if application.status == "DEPLOY_FAILED":
                raise ClusterError("child", f"the server did not start ({cause(message)})")
            if application.status == "RUNNING" and set(status.proxies.values()) == {"HEALTHY"}:
                return True
        if stopped.wait(0.2):
            return False
    problem = f"the server is not ready after {timeout_s:g} s ({cause(message) or 'no word from Serve'})"
    raise ClusterError("start_timeout_s", problem, "give it longer, or look at `ray status`")


def cause(text: str) -> str:
    """The line of Serve's message that says what went wrong: the last that names an error, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]+Error: ", line)]
    return (named or lines or [""])[-1].removeprefix("puzzle_ray.errors.")


def announce(host: str, port: int, name: str) -> None:
    """One line with the URL and a request to try."""
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/v1"
    body = f'{{"model": "{name}", "prompt": "Once upon a time", "max_tokens": 32, "temperature": 0}}'
    typer.echo(f"serving {name} at {url}   try: curl {url}/completions -H 'Content-Type: application/json' -d '{body}'")


def watch(stopped: threading.Event) -> None:
    """Wait for the stop, and say so whenever Serve's own view of the server changes."""
    from ray import serve

    known = "RUNNING"
    while not stopped.wait(5.0):
        application = serve.status().applications.get(_APPLICATION)
        state = str(application.status.value) if application is not None else "GONE"
        if state != known:
            typer.echo(f"the server is {state}" + (f": {cause(application.message)}" if application else ""), err=True)
            known = state


VERB = Verb("serve-child", RESULTS, serve_child)

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
