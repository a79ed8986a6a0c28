"""Joining or starting Ray, without waiting for ever, and ending what was started."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from puzzle_ray.cluster import ClusterConfig
from puzzle_ray.errors import ClusterError
from puzzle_ray.process import num_cores

SILENT: Mapping[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
# A Ray of our own has no dashboard, and forwards no logs to the driver: what its processes collect for those is read by nobody, and
# costs the cores that compute a hundredth of their time. Whoever wants it sets these variables otherwise.
QUIET = {
    "RAY_task_events_report_interval_ms": "0",  # no record of every task
    "REPORTER_UPDATE_INTERVAL_MS": "60000",  # of a node's use of its hardware; Ray itself: 5 s
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",  # new log files are looked for at the interval below, not ten times a second
    "LOG_NAME_UPDATE_INTERVAL_S": "5",
}


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


def start_here(num_cpus: int, object_store_memory: int) -> None:
    """Starts a Ray that ends with this process, on this machine alone (loopback)."""
    import ray

    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # else Ray's servers listen on every interface
    quiet = {name: value for name, value in QUIET.items() if name not in os.environ}
    os.environ.update(quiet)  # Ray's own processes inherit them
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=object_store_memory,
            _node_ip_address="127.0.0.1",
            **SILENT,
        )
    finally:
        for name in quiet:  # a cluster that this process joins later is not ours
            del os.environ[name]


def joins(cluster: ClusterConfig) -> bool:
    """Whether a run joins a cluster that is there, in place of starting one of its own."""
    return cluster.address != "local" or bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def connected(cluster: ClusterConfig, window_bytes: int = 0) -> Iterator[None]:
    """A Ray session: joined if there is one already or an address is given, else started on this machine alone (loopback).

    Raises ClusterError when the address does not answer within `cluster.connect_timeout_s`.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = cluster.address
    if address == "local" and os.environ.get("RAY_ADDRESS"):
        address = os.environ["RAY_ADDRESS"]
    known = _last_started() if address == "auto" else address
    if known and address != "local":
        _probe(known, cluster.connect_timeout_s)
    os.environ.setdefault("RAY_gcs_server_request_timeout_seconds", str(max(1, int(cluster.connect_timeout_s))))
    try:
        if address == "local":
            start_here(num_cores(), object_store_bytes(window_bytes))
        else:
            ray.init(address=address, **SILENT)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ClusterError("cluster.address", f"Ray cannot be reached at {address!r} ({reason})", "check the address") from None
    try:
        yield
    finally:
        ray.shutdown()
