"""Joining or starting Ray, without waiting for ever, and ending what was started.

Nothing here or above imports Ray before it is known which cluster it is for: Ray reads some variables once, when it is imported.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from jobs import endings
from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.errors import ClusterError, PuzzleError
from puzzle_ray.process import num_cores

SILENT: Mapping[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
LOOPBACK = "127.0.0.1"
# Of every process that computes. They are the same for all, so that any process that Ray has ready can become any actor: what an actor
# needs beside them, such as its number of threads, it sets itself. What the user has set stays.
ENVIRONMENT: Mapping[str, str] = {
    "OMP_NUM_THREADS": "1",  # until an actor says how many it computes with
    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads that spin starve each other on a busy machine
    "MALLOC_ARENA_MAX": "1",  # malloc treats every thread as it treats a process' first
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
# Of Ray Serve's processes: requests are passed on and answered on one event loop, not on two that wake each other for every message.
# Nothing of ours blocks that loop.
SERVE_ENVIRONMENT: Mapping[str, str] = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # the variable by which Ray tells a submitted job's driver what it was submitted with
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: Ray's servers listen on loopback, and not on every interface


def _probe(address: str, timeout_s: float) -> None:
    """Raises ClusterError unless a gRPC server, as Ray's is, answers at host:port in time. `ray.init` itself would wait for minutes."""
    import grpc

    host, _, port = address.rpartition(":")
    if "://" in address:
        raise ClusterError(
            "cluster.address", f"{address!r}: Ray Client cannot run Train and Tune", "use `ray job submit`, or host:port"
        )
    if not host or not port.isdigit():
        raise ClusterError("cluster.address", f"{address!r} is no address", "write local, auto or host:port")
    remedy = "start it with `ray start --head`, or use address local"
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
        if os.environ.get("RAY_USE_TLS", "0") in ("0", ""):
            with grpc.insecure_channel(address) as channel:
                grpc.channel_ready_future(channel).result(timeout=timeout_s)
    except OSError as error:
        raise ClusterError("cluster.address", f"no Ray answers at {address!r} ({error})", remedy) from None
    except grpc.FutureTimeoutError:
        problem = f"what listens at {address!r} does not answer as Ray within {timeout_s:g} s"
        raise ClusterError("cluster.address", problem, remedy) from None


def _last_started() -> str | None:
    """The address `ray start` left on this machine for `auto` to find; it stays there when that cluster has died."""
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    return note.read_text().strip() if note.is_file() else None


def object_store_bytes(window_bytes: int) -> int:
    """A local cluster's object store: twice what the window of micro-batches can hold, at least 256 MiB."""
    return max(256 << 20, 2 * window_bytes)


@contextmanager
def unless_set(variables: Mapping[str, str]) -> Iterator[None]:
    """The variables in this process' environment, except those that are there already; gone after the block."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def start_here(num_cpus: int, object_store_memory: int) -> None:
    """Starts a Ray that ends with this process, on this machine alone: its servers listen on loopback.

    That takes a process that has not imported Ray before; in another one it is said that they listen on every interface.
    """
    if "ray" not in sys.modules:
        os.environ.setdefault(LOOPBACK_ONLY, "0")
    elif os.environ.get(LOOPBACK_ONLY) != "0":
        print(f"  Ray was imported without {LOOPBACK_ONLY}=0: its servers listen on every interface", file=sys.stderr, flush=True)
    import ray

    with unless_set(ENVIRONMENT):  # Ray's own processes inherit them; this one, and a cluster that it joins later, do without
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=object_store_memory,
            _node_ip_address=LOOPBACK,
            **SILENT,
        )


def job_environment() -> dict[str, str]:
    """The variables that a cluster that is joined sets for this job's processes: as they are here, where the user has set them.

    Without those that a submitted job was submitted with: Ray refuses to be told twice.
    """
    submitted = json.loads(os.environ.get(SUBMITTED, "{}")).get("runtime_env") or {}
    already = submitted.get("env_vars") or {}
    return {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items() if name not in already}


def joins(cluster: ClusterConfig) -> bool:
    """Whether a run joins a cluster that is there, in place of starting one of its own."""
    return cluster.address != "local" or bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def connected(cluster: ClusterConfig, window_bytes: int = 0) -> Iterator[None]:
    """A Ray session: joined if there is one already or an address is given, else started on this machine alone (loopback).

    Raises ClusterError when the address does not answer within `cluster.connect_timeout_s`.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield
        return
    address = cluster.address
    if address == "local" and os.environ.get("RAY_ADDRESS"):
        address = os.environ["RAY_ADDRESS"]
    known = _last_started() if address == "auto" else address
    if known and address != "local":
        _probe(known, cluster.connect_timeout_s)
    os.environ.setdefault("RAY_gcs_server_request_timeout_seconds", str(max(1, int(cluster.connect_timeout_s))))
    with _own(window_bytes) if address == "local" else _joined(address):
        yield


@contextmanager
def _own(window_bytes: int) -> Iterator[None]:
    """A Ray of our own. When the block ends, however it does, none of its processes is left."""
    with endings.native_prints_logged() as log, endings.Descendants():
        try:
            with endings.starting():
                print(f"  starting Ray on {num_cores()} cores", file=sys.stderr, flush=True)
                start_here(num_cores(), object_store_bytes(window_bytes))
        except PuzzleError:
            raise
        except Exception as error:  # Ray raises everything here, a bare Exception among it
            remedy = "see that this machine has memory, room in /dev/shm and in the temporary folder, or join a cluster"
            raise ClusterError("cluster", f"Ray cannot be started on this machine ({_reason(error)})", remedy) from None
        signals = endings.current()
        if signals is not None:
            signals.watch_ray(log)
        try:
            yield
        finally:
            if signals is not None:
                signals.leave_ray()
            sys.modules["ray"].shutdown()


@contextmanager
def _joined(address: str) -> Iterator[None]:
    with endings.native_prints_logged() as log:
        try:
            with endings.starting():
                _join(address)
        except PuzzleError:
            raise
        except Exception as error:
            problem = f"Ray cannot be reached at {address!r} ({_reason(error)})"
            raise ClusterError("cluster.address", problem, "check the address") from None
        ray, signals = sys.modules["ray"], endings.current()
        gcs = ray.get_runtime_context().gcs_address
        with signals.cluster_watched(gcs, log) if signals is not None else nullcontext():
            try:
                yield
            finally:
                ray.shutdown()


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _join(address: str) -> None:
    import ray

    ray.init(address=address, runtime_env={"env_vars": job_environment()}, **SILENT)
