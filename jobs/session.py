"""Joining or starting Ray, without waiting for ever, and ending what was started."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from puzzle_ray.config import ClusterConfig
from puzzle_ray.errors import ClusterError


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
    common = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    try:
        if address == "local":
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # else Ray's servers listen on every interface
            cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=object_store_bytes(window_bytes),
                _node_ip_address="127.0.0.1",
                **common,
            )
        else:
            ray.init(address=address, **common)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ClusterError("cluster.address", f"Ray cannot be reached at {address!r} ({reason})", "check the address") from None
    try:
        yield
    finally:
        ray.shutdown()
