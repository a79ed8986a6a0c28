"""Who may ask, and how much a request may send: on ASGI's messages, without a web framework."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from puzzle_ray.errors import ConfigError
from puzzle_ray.serving.api_errors import BodyRefused, Json, KeyRefused, error_headers, error_response

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/health", "/metrics")  # for those who watch the server
_WHOLE_BODY = 4  # times the time that its next part may take


def without_end_slash(path: str, root_path: str = "") -> str:
    """The path that a client means which puts a slash at its end. `root_path` is the server's own prefix of it."""
    return path.rstrip("/") if len(path.rstrip("/")) > len(root_path) else path


async def read_body(headers: Mapping[str, str], receive: Receive, most_bytes: int, timeout_s: float) -> bytes:
    """A request's whole body. Raises BodyRefused where it is longer, or does not come in time.

    `timeout_s` is for the next part. A client that sends a byte now and then has four times as long for the whole.
    """
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise BodyRefused(415, f"the body is encoded ({encoding[:40]}); send it as it is, without Content-Encoding")
    declared = headers.get("content-length", "")
    too_long = BodyRefused(413, f"the body is longer than {most_bytes} bytes, which is the limit here (max_body_mib)")
    if declared.isdigit() and int(declared[:20]) > most_bytes:
        raise too_long
    parts: list[bytes] = []
    length, until = 0, time.monotonic() + _WHOLE_BODY * timeout_s
    while True:
        left_s = until - time.monotonic()
        message = await _within(min(timeout_s, left_s), receive)
        if message is None:
            late = (
                f"did not go on within {timeout_s:g} s"
                if left_s > timeout_s
                else f"was not there after {_WHOLE_BODY * timeout_s:g} s"
            )
            raise BodyRefused(408, f"the body {late}")
        if message["type"] != "http.request":
            raise BodyRefused(400, "the client has left before its body was there")
        parts.append(message.get("body", b""))
        length += len(parts[-1])
        if length > most_bytes:
            raise too_long
        if not message.get("more_body", False):
            return b"".join(parts)


async def _within(timeout_s: float, receive: Receive) -> MutableMapping[str, Any] | None:
    """The next message, or None if it does not come in time.

    Python's own `wait_for` before 3.12 loses a cancellation that comes just after the message: the client's leaving, for one.
    """
    coming = asyncio.ensure_future(receive())
    try:
        await asyncio.wait([coming], timeout=max(timeout_s, 0.0))
        return coming.result() if coming.done() else None
    finally:
        coming.cancel()


async def send_json(send: Send, status: int, body: Json) -> None:
    """An answer on its own, with the headers that belong to its status."""
    content = json.dumps(body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content)), **(error_headers(status) or {})}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": content})


class KeyCheck:
    """Lets requests with a known key through to `app`, answers 401 to others. Without digests everybody may ask.

    `digests` are SHA-256 of the keys, in hexadecimal: whoever reads a configuration has no key.
    """

    def __init__(self, app: Application, digests: Collection[str]) -> None:
        self._app = app
        self._digests = tuple(digest.lower() for digest in digests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests and not self._may_pass(scope):
            await send_json(send, *error_response(KeyRefused()))
            return
        await self._app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        path = str(scope["path"]).removeprefix(str(scope.get("root_path", "")))
        if path in OPEN_PATHS or scope.get("method") == "OPTIONS":  # a browser asks what it may send, and sends no key with that
            return True
        kind, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).hexdigest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, whichever is the one
        return kind.lower() == b"bearer" and any(matches)


def key_digests(file: str) -> tuple[str, ...]:
    """The digests of the keys in a file, one key a line. Raises ConfigError."""
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError("api_key_file", f"{file} cannot be read ({error})", "name a text file with one key a line") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ConfigError("api_key_file", f"{file} holds no key", "write one key a line")
    return tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys)
