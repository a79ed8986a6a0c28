"""Serve a child (or any Hugging Face causal LM) with OpenAI's API, on Ray Serve; loopback unless told otherwise.

python -m jobs.serve_child --child runs/child
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from pydantic import ValidationError

from jobs.command import RESULTS, Debug, Verb
from jobs.session import SERVE_ENVIRONMENT, connected, unless_set
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from puzzle_ray.serving.settings import ServeSettings

APPLICATION = "puzzle-ray-child"
_DTYPES = ("auto", "float32", "bfloat16", "float16")
# Serve ends by killing its controller in the middle of the call that asks for it, and Ray prints on stdout that this call failed.
_SERVES_END = "ServeController.graceful_shutdown failed"

Children = Annotated[
    list[str],
    typer.Option(
        "--child", help="Hugging Face folder: a path, an fsspec URL or a hub id; NAME=FOLDER names it. May be repeated."
    ),
]


def serve_child(
    child: Children,
    host: Annotated[str, typer.Option(help="Interface to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    address: Annotated[str, typer.Option(help="Ray: local (one of its own), auto, or host:port.")] = "local",
    name: Annotated[str, typer.Option(help="Serve's application: several on one cluster need names of their own.")] = APPLICATION,
    route_prefix: Annotated[str, typer.Option(help="Path before /v1; several applications need prefixes of their own.")] = "/",
    served_model_name: Annotated[str | None, typer.Option(help="Name in requests; the folder's name if not given.")] = None,
    api_key_file: Annotated[str | None, typer.Option(help="File of keys, one a line; requests need one of them.")] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Web page's origin that may ask (CORS); may be repeated.")
    ] = None,
    engine: Annotated[str, typer.Option(help="puzzle, vllm or tensorrt_llm.")] = "puzzle",
    generation_config: Annotated[
        str,
        typer.Option(help="auto: what requests leave out is as the model's generation_config.json says; none: as OpenAI does."),
    ] = "auto",
    max_batch_size: Annotated[int, typer.Option(min=1, help="Requests decoded together, per model.")] = 16,
    max_length: Annotated[int, typer.Option(min=0, help="Tokens of prompt and answer; 0 is the model's own limit.")] = 0,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait, per model; more get a 503.")] = 256,
    kv_cache_mib: Annotated[float, typer.Option(min=0, help="Memory for keys and values; 0 is a share of what is free.")] = 0,
    prefill_tokens: Annotated[int, typer.Option(min=1, help="Prompt tokens read between two decode steps.")] = 512,
    num_replicas: Annotated[int, typer.Option(min=1)] = 1,
    max_replicas: Annotated[int, typer.Option(min=0, help="Scale from --num-replicas up to so many; 0 does not scale.")] = 0,
    num_cpus: Annotated[int, typer.Option(min=1, help="Cores (and threads) per replica.")] = 1,
    num_gpus: Annotated[float, typer.Option(min=0, help="GPUs per replica; 0 runs on the CPU.")] = 0,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(_DTYPES)}; auto is the model's own.")] = "auto",
    start_timeout_s: Annotated[float, typer.Option(help="Give up when the replicas are not ready by then.")] = 300.0,
    grace_period_s: Annotated[float, typer.Option(help="At the end, requests in progress have so long to finish.")] = 30.0,
    debug: Debug = False,
) -> None:
    """Serve models until SIGINT (Ctrl-C) or SIGTERM; requests in progress are finished, a second signal cuts them."""
    own_cluster = address == "local" and not os.environ.get("RAY_ADDRESS")
    if dtype not in _DTYPES:
        raise ConfigError("dtype", f"is {dtype!r}", f"give one of {', '.join(_DTYPES)}")
    if not route_prefix.startswith("/") or (route_prefix != "/" and route_prefix.endswith("/")):
        raise ConfigError("route_prefix", f"is {route_prefix!r}", "write / or /some/path, without a slash at the end")
    models = named_models(child, served_model_name)
    if own_cluster:
        check_port(host, port)
    scaling = {"min_replicas": num_replicas, "max_replicas": max_replicas, "target_ongoing_requests": max_batch_size}
    settings = server_settings(
        models={each: check_child(folder, max_length) for each, folder in models.items()},
        engine=engine, dtype=dtype, generation_config=generation_config, max_batch_size=max_batch_size, max_length=max_length,
        max_waiting=max_waiting, kv_cache_mib=kv_cache_mib, prefill_tokens=prefill_tokens, allowed_origins=tuple(allow_origin or ()),
        num_replicas=1 if max_replicas else num_replicas, autoscaling=scaling if max_replicas else None,
        num_cpus=num_cpus, num_gpus=num_gpus, grace_period_s=grace_period_s, api_key_sha256=digests(api_key_file),
    )  # fmt: skip
    if settings.generation_config == "auto":
        tell_defaults(settings.models)
    warn_if_open(host, port, settings)
    environment = SERVE_ENVIRONMENT if own_cluster else {}
    printed = redirect_stdout(WithoutLine(sys.stdout, _SERVES_END))
    with unless_set(environment), printed, connected(ClusterConfig(address=address)), stop_signals() as stopped:
        check_resources(settings)
        with deployed(settings, name, route_prefix, (host, port), own_cluster, stopped):
            if wait_until_running(name, start_timeout_s, stopped.first, proxied=not direct(settings, own_cluster)):
                announce(host, port, route_prefix, list(models), api_key_file)
                watch(name, stopped.first)


def named_models(children: Sequence[str], served_model_name: str | None) -> dict[str, str]:
    """Name in requests -> folder. Raises ConfigError."""
    from puzzle_ray.serving.settings import model_name

    models: dict[str, str] = {}
    for child in children:
        before, equals, after = child.partition("=")
        named = bool(equals) and "/" not in before
        folder = after if named else child
        name = before if named else served_model_name or model_name(folder)
        if not name or not folder:
            raise ConfigError("child", f"is {child!r}", "write FOLDER or NAME=FOLDER")
        if name in models:
            raise ConfigError("child", f"two models are called {name!r}", "name them: --child NAME=FOLDER")
        models[name] = folder
    return models


def server_settings(**fields: Any) -> ServeSettings:
    """The settings of the server. Raises ConfigError that names the option."""
    from puzzle_ray.serving.settings import ServeSettings

    try:
        return ServeSettings.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "serve-child"
        raise ConfigError(where, f"{first['msg']} (it is {first['input']!r})") from None


def digests(api_key_file: str | None) -> tuple[str, ...]:
    """SHA-256 of the keys in a file; none where there is no file."""
    from puzzle_ray.serving.access import key_digests

    return key_digests(api_key_file) if api_key_file else ()


def check_port(host: str, port: int) -> None:
    """Raises ConfigError if nothing can listen there."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ConfigError("port", f"{host}:{port} cannot be had ({error.strerror})", "give another --port or --host") from None


def check_child(child: str, max_length: int) -> str:
    """What the replicas load: an absolute path, a hub id or a URL. A model on this machine is looked at whole. Raises PuzzleError."""
    from puzzle_ray.serving.fetch import check_model, check_servable

    found = check_model(child)
    if "://" not in found:
        check_servable(found, max_length)
    return found


def warn_if_open(host: str, port: int, settings: ServeSettings) -> None:
    """Says so where other machines may use the server without a key."""
    if host not in ("127.0.0.1", "localhost", "::1") and not settings.api_key_sha256:
        typer.echo(
            f"warning: whoever reaches {host}:{port} can use this server; --api-key-file lets in only those with a key", err=True
        )


def tell_defaults(models: Mapping[str, str]) -> None:
    """A line per model that has a sampling of its own. Raises ParentError, ConfigError."""
    from puzzle_ray.serving.fetch import read_sampling_defaults

    for name, folder in models.items():
        defaults = read_sampling_defaults(folder)
        if str(defaults):
            typer.echo(
                f"{name}: requests that leave it out get {defaults} (its own; --generation-config none: OpenAI's)", err=True
            )
        if defaults.unused:
            typer.echo(f"warning: {name}'s generation_config.json has {', '.join(defaults.unused)}: not applied here", err=True)


class WithoutLine:
    """A stream of text that leaves out what is printed with `said` in it, and the end of that line."""

    def __init__(self, stream: TextIO, said: str) -> None:
        self._stream, self._said, self._left_out = stream, said, False

    def write(self, text: str) -> int:
        end_of_it = self._left_out and text == "\n"
        self._left_out = self._said in text and not text.endswith("\n")
        return len(text) if end_of_it or self._said in text else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Stops:
    """Which signals to stop have come: `first` asks to finish, `second` to cut what is not finished."""

    def __init__(self) -> None:
        self.first, self.second = threading.Event(), threading.Event()

    def tell(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


@contextmanager
def stop_signals() -> Iterator[Stops]:
    """Told of SIGINT and SIGTERM, in place of what they did before."""
    stopped = Stops()
    before = {number: signal.signal(number, lambda *_: stopped.tell()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_resources(settings: ServeSettings) -> None:
    """Raises ClusterError when the cluster can never hold the replicas: Ray itself would wait for ever."""
    import ray

    have, replicas = ray.cluster_resources(), settings.most_replicas
    for kind, each in (("CPU", settings.num_cpus), ("GPU", settings.num_gpus)):
        if replicas * each > have.get(kind, 0):
            problem = f"{replicas} x {each:g} {kind} is more than the cluster's {have.get(kind, 0):g}"
            raise ClusterError("num_replicas", problem, f"ask for fewer replicas, or for less {kind} each")


@contextmanager
def deployed(
    settings: ServeSettings, name: str, route_prefix: str, where: tuple[str, int], own_cluster: bool, stopped: Stops
) -> Iterator[None]:
    """The application, started but not waited for. After the block it is gone, and so is Serve on a cluster that nobody else serves on.

    On a cluster of one's own, Serve ends with it.
    """
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from actors.direct_http import Where
    from actors.serve import application, start_serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet, (host, port), itself = {"log_level": "WARNING"}, where, direct(settings, own_cluster)
    status = serve.status()
    if status.proxies:
        typer.echo("Serve runs on this cluster already: the host and port it was started with hold", err=True)
    elif status.applications and not itself:
        problem = f"Serve there has no proxy: {', '.join(status.applications)} listens itself"
        raise ClusterError("address", problem, "give --address local, for a Ray of its own")
    elif not own_cluster:
        check_port(host, port)
    if name in status.applications:
        raise ConfigError("name", f"an application {name!r} runs on this cluster already", "give another --name, or end that one")
    ended_well = False
    try:
        start_serve(host, port, proxied=not itself)
        server = application(settings, Where(host, port, route_prefix) if itself else None)
        target = serve.RunTarget(target=server, name=name, route_prefix=route_prefix, logging_config=quiet)
        try:
            serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        except RayServeException as error:  # such as a prefix that another application has
            raise ConfigError(
                "route_prefix", f"is {route_prefix!r} ({cause(str(error))})", "give another --route-prefix"
            ) from None
        yield
        ended_well = True
    finally:
        if ended_well or not own_cluster:  # after a failure an own cluster just ends: nothing is in work
            end_application(name, settings.grace_period_s, stopped.second)
            # An own cluster ends as a whole. Serve's own end would kill its controller first, which Ray reports as a failure.
            if not (own_cluster or status.proxies or serve.status().applications):
                serve.shutdown()


def end_application(name: str, grace_period_s: float, cut: threading.Event) -> None:
    """Takes one application off the cluster. Its requests in progress are finished within the grace period."""
    from ray import serve

    if name not in serve.status().applications:
        return
    serve.delete(name, _blocking=False)
    deadline = time.monotonic() + grace_period_s + 5.0
    said = False
    while name in serve.status().applications and time.monotonic() < deadline and not cut.wait(0.2):
        if not said and time.monotonic() > deadline - grace_period_s - 4.0:
            typer.echo(
                f"requests in progress are finished, for at most {grace_period_s:g} s; a second Ctrl-C cuts them", err=True
            )
            said = True


def direct(settings: ServeSettings, own_cluster: bool) -> bool:
    """Whether the replica listens itself, without Serve's proxy."""
    from actors.direct_http import listens_itself

    return own_cluster and listens_itself(settings)


def wait_until_running(name: str, timeout_s: float, stopped: threading.Event, proxied: bool = True) -> bool:
    """True once requests are answered, False if stopped before. Raises ClusterError."""
    from ray import serve

    deadline, message = time.monotonic() + timeout_s, ""
    while time.monotonic() < deadline:
        status = serve.status()
        application = status.applications.get(name)
        if application is not None:
            parts = [application.message, *(each.message for each in application.deployments.values())]
            message = next((part for part in reversed(parts) if part), "")
            if application.status == "DEPLOY_FAILED":
                raise ClusterError("child", f"the server did not start ({cause(message)})")
            if application.status == "RUNNING" and (not proxied or set(status.proxies.values()) == {"HEALTHY"}):
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


def announce(host: str, port: int, route_prefix: str, names: Sequence[str], api_key_file: str | None = None) -> None:
    """One line with the URL and a request to try, which has a key where requests need one."""
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}{route_prefix.rstrip('/')}/v1"
    body = f'{{"model": "{names[0]}", "prompt": "Once upon a time", "max_tokens": 32, "temperature": 0}}'
    headers = "-H 'Content-Type: application/json'" + (" -H 'Authorization: Bearer KEY'" if api_key_file else "")
    which = f"   (KEY: a line of {api_key_file})" if api_key_file else ""
    typer.echo(f"serving {', '.join(names)} at {url}   try: curl {url}/completions {headers} -d '{body}'{which}")


def watch(name: str, stopped: threading.Event) -> None:
    """Wait for the stop, and say so whenever Serve's own view of the server changes."""
    from ray import serve

    known = "RUNNING"
    while not stopped.wait(5.0):
        application = serve.status().applications.get(name)
        state = str(application.status.value) if application is not None else "GONE"
        if state != known:
            typer.echo(f"the server is {state}" + (f": {cause(application.message)}" if application else ""), err=True)
            known = state


VERB = Verb("serve-child", RESULTS, serve_child)

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
