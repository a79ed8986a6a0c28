"""HTTP in the replica itself, for a server of one replica: nothing stands between it and its clients.

Ray Serve's proxy hands every event on from process to process, which costs a tenth and more of a small model's time. Serve's own way
around it (RAY_SERVE_ENABLE_DIRECT_INGRESS) is made for load balancers: it keeps a proxy on the head node, cannot listen again on a port
that was in use a minute ago, and at the end takes new requests for as long as old ones run. So the replica has an HTTP server of its own.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
import uuid
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import uvicorn
from ray import serve

from puzzle_ray.errors import ClusterError, ConfigError
from puzzle_ray.serving.access import OPEN_PATHS, Application, Receive, Scope, Send, send_json, without_end_slash
from puzzle_ray.serving.api_errors import error_body
from puzzle_ray.serving.settings import ServeSettings

KEEP_ALIVE_S = 60  # a connection without a request ends after this
# Whoever sets one of these asks for Serve's own ways to its replicas, its proxy (0) among them.
_SERVES_WAYS = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_ENABLE_DIRECT_INGRESS", "RAY_SERVE_THROUGHPUT_OPTIMIZED")
_MARGIN_S = 5.0
_REQUEST_ID = b"x-request-id"


class Where(NamedTuple):
    """The address that a replica listens on, and the path before its routes (`/`, or without a slash at its end)."""

    host: str
    port: int
    route_prefix: str = "/"


def listens_itself(settings: ServeSettings) -> bool:
    """Whether the replica of such a server, on a Ray of its own, listens itself: it is the only one, and its routes are ours."""
    asked_otherwise = any(name in os.environ for name in _SERVES_WAYS)
    return settings.engine == "puzzle" and settings.autoscaling is None and settings.num_replicas == 1 and not asked_otherwise


class DirectHttp:
    """Listens from the start on, and answers once this process' replica is ready: its deployment is the application.

    A replica that this one replaces may have the port until it has ended. Raises ConfigError if the port is not to be had by then.
    """

    def __init__(self, where: Where, settings: ServeSettings) -> None:
        self._where, self._most = where, settings.max_ongoing_requests
        self._socket = _listening(where, settings.grace_period_s + _MARGIN_S)
        self._server: uvicorn.Server | None = None
        self._serving = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        while (replica := serve.get_replica_context().servable_object) is None:
            await asyncio.sleep(0.01)
        application = Requests(replica, self._where.route_prefix, self._most)
        config = uvicorn.Config(
            application, lifespan="off", ws="none", loop="none", timeout_keep_alive=KEEP_ALIVE_S,
            access_log=False, log_config=None, log_level="error", proxy_headers=False,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        await self._server.serve(sockets=[self._socket])

    def check(self) -> None:
        """Raises ClusterError where nothing listens any more."""
        if self._serving.done():
            why = "it was told to" if self._serving.cancelled() else self._serving.exception() or "it was told to"
            raise ClusterError("port", f"the HTTP server has ended ({why})", "another replica takes its place")

    async def stop(self) -> None:
        """Nothing new is accepted, idle connections end. Returns once all requests in progress are answered."""
        if self._server is None:
            self._serving.cancel()
            self._socket.close()
        else:
            self._server.should_exit = True
        await asyncio.wait([self._serving])


class Requests:
    """What Serve's proxy does around an ASGI application: its prefix, an id for each request, a limit on their number.

    The work on a request whose client has gone is cancelled.
    """

    def __init__(self, app: Application, route_prefix: str, most: int) -> None:
        self._app, self._prefix, self._most = app, route_prefix.rstrip("/"), most
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = _Client(scope, receive, send)
        path = str(scope["path"])
        below = without_end_slash(path, self._prefix).removeprefix(self._prefix)
        if self._prefix and path != self._prefix and not path.startswith(f"{self._prefix}/"):
            await send_json(
                client.send, 404, error_body(f"{scope['method']} {path}: Not Found; paths here begin with {self._prefix}/")
            )
            return
        if self._running >= self._most and below not in OPEN_PATHS:
            body = error_body(f"{self._running} requests are being answered or read", kind="server_error", code="engine_busy")
            await send_json(client.send, 503, body)
            return
        scope["root_path"] = self._prefix
        self._running += 1
        try:
            await self._app(scope, client.receive, client.send)
        except asyncio.CancelledError:
            if not client.has_left:
                raise
        finally:
            self._running -= 1
            client.forget()


class _Client:
    """The other end of one request. Once its body has come whole, its leaving cancels the task that the request was made in."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._id = dict(scope["headers"]).get(_REQUEST_ID) or str(uuid.uuid4()).encode()
        self._work = asyncio.current_task()
        self._watch: asyncio.Task[None] | None = None
        self.has_left = False

    async def receive(self) -> MutableMapping[str, Any]:
        if self._watch is not None:
            await asyncio.shield(self._watch)
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._watch = asyncio.get_running_loop().create_task(self._wait_until_left())
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (_REQUEST_ID, self._id)]
        elif not message.get("more_body", False):
            self.forget()  # the connection says that it is left, too, when the answer is there
        await self._send(message)

    async def _wait_until_left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.has_left = True
        if self._work is not None:
            self._work.cancel()

    def forget(self) -> None:
        if self._watch is not None:
            self._watch.cancel()


def _listening(where: Where, patience_s: float) -> socket.socket:
    """A socket that listens there. Raises ConfigError."""
    until = time.monotonic() + patience_s
    while True:
        sock = socket.socket()
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a replica before this one may linger
            sock.bind((where.host, where.port))
            sock.listen(2048)
            return sock
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRINUSE or time.monotonic() > until:
                problem = f"{where.host}:{where.port} cannot be had ({error.strerror})"
                raise ConfigError("port", problem, "give another --port or --host") from None
        time.sleep(0.2)
