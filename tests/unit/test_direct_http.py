"""HTTP in the replica: what is around its application, without Ray."""

import asyncio
import json
import socket
import threading

import pytest

from actors.direct_http import Requests, Where, _listening, listens_itself
from puzzle_ray.errors import ConfigError
from puzzle_ray.serving.access import read_body
from puzzle_ray.serving.settings import ServeSettings


class Connection:
    """One request as an HTTP server hands it over, and what was sent back."""

    def __init__(self, path="/v1/completions", parts=(b"{}",), method="POST", headers=()):
        self.scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
        self.messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        self.messages[-1]["more_body"] = False
        self.left, self.sent = asyncio.Event(), []

    async def receive(self):
        if self.messages:
            return self.messages.pop(0)
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.left.set()  # as an HTTP server does once the answer is there

    def answer(self):
        start, *parts = self.sent
        return start["status"], dict(start["headers"]), json.loads(b"".join(part["body"] for part in parts))


async def read(receive):
    while (await receive()).get("more_body", False):
        pass


async def echo(scope, receive, send):
    """Answers with the path and its prefix, in two parts between which others run."""
    await read(receive)
    body = json.dumps([scope["root_path"], scope["path"]]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body[:3], "more_body": True})
    await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": body[3:]})
    await asyncio.sleep(0)
    scope["done"] = True


def asked(app, *connections, route_prefix="/", most=8):
    async def run():
        requests = Requests(app, route_prefix, most)
        found = [connection() for connection in connections]
        await asyncio.gather(*(requests(each.scope, each.receive, each.send) for each in found))
        return found

    return asyncio.run(run())


@pytest.mark.parametrize(("prefix", "root"), [("/", ""), ("/some/where", "/some/where")])
def test_an_answer_passes_through_and_its_end_cancels_nothing(prefix, root):
    (one,) = asked(echo, lambda: Connection(f"{root}/v1/completions", (b"a", b"b")), route_prefix=prefix)
    status, headers, body = one.answer()
    assert (status, body, one.scope["done"]) == (200, [root, f"{root}/v1/completions"], True)
    assert len(headers[b"x-request-id"]) == 36


def test_a_request_keeps_the_id_that_it_came_with():
    (one,) = asked(echo, lambda: Connection(headers=[(b"x-request-id", b"mine")]))
    assert one.answer()[1][b"x-request-id"] == b"mine"


def test_other_paths_than_those_under_the_prefix_are_told_so_as_openais_clients_read_it():
    for path in ("/", "/v1/models", "/herefore/v1/models"):
        (one,) = asked(echo, lambda path=path: Connection(path), route_prefix="/here")
        status, _, body = one.answer()
        assert status == 404 and "paths here begin with /here/" in body["error"]["message"]


def test_more_requests_than_there_may_be_are_told_to_come_back_and_those_who_watch_are_not():
    def several(path):
        return [Connection for _ in range(2)] + [lambda: Connection(path)]

    *_, more = asked(echo, *several("/v1/completions"), most=2)
    status, headers, body = more.answer()
    assert (status, headers[b"retry-after"], body["error"]["code"]) == (503, b"1", "engine_busy")
    for path in ("/here/health", "/here/health/"):
        *two, watching = asked(echo, *several(path), most=2, route_prefix="/here")
        assert watching.answer()[0] == 200
    assert [one.answer()[0] for one in asked(echo, *[Connection] * 2, most=2)] == [200, 200]


@pytest.mark.parametrize("streaming", [True, False])
def test_the_work_of_a_client_that_leaves_is_cancelled_and_its_place_is_free(streaming):
    ended = []

    async def work(scope, receive, send):
        await read(receive)
        if streaming:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(scope["path"])

    async def run():
        requests, connection = Requests(work, "/", 1), Connection()
        task = asyncio.create_task(requests(connection.scope, connection.receive, connection.send))
        await asyncio.sleep(0.01)
        assert not ended
        connection.left.set()
        await asyncio.wait_for(task, 10)  # it ends well: the HTTP server has nothing to log
        assert ended and requests._running == 0

    asyncio.run(run())


def test_the_leaving_of_a_client_is_not_lost_though_it_comes_at_once_after_its_request():
    """Wherever in the reading of the body it comes, in turns of the event loop."""
    ended = []

    async def work(scope, receive, send):
        try:
            await read_body({}, receive, 100, 30.0)
            await asyncio.Event().wait()
        finally:
            ended.append(scope["path"])

    async def run(turns):
        connection = Connection()
        task = asyncio.create_task(Requests(work, "/", 1)(connection.scope, connection.receive, connection.send))
        for _ in range(turns):
            await asyncio.sleep(0)
        connection.left.set()
        done, _ = await asyncio.wait([task], timeout=240)
        assert done

    for turns in range(8):
        asyncio.run(run(turns))
    assert len(ended) == 8


def test_a_cancellation_by_the_server_itself_is_one():
    async def run():
        requests, connection = Requests(lambda *_: asyncio.Event().wait(), "/", 1), Connection()
        task = asyncio.create_task(requests(connection.scope, connection.receive, connection.send))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert requests._running == 0

    asyncio.run(run())


def test_a_client_that_leaves_before_its_body_is_there_is_the_applications_matter():
    seen = []

    async def app(scope, receive, send):
        seen.append(await receive())

    async def run():
        connection = Connection()
        connection.messages.clear()
        connection.left.set()
        await Requests(app, "/", 1)(connection.scope, connection.receive, connection.send)

    asyncio.run(run())
    assert seen == [{"type": "http.disconnect"}]


def test_a_port_that_a_replica_before_still_has_is_waited_for_and_one_that_stays_taken_is_told():
    before = _listening(Where("127.0.0.1", 0), 0.0)
    where = Where(*before.getsockname())
    with pytest.raises(ConfigError, match=f"port: 127.0.0.1:{where.port} cannot be had .Address already in use."):
        _listening(where, 0.0)
    with pytest.raises(ConfigError, match="host"):
        _listening(Where("192.0.2.1", where.port), 60.0)  # no address of this machine, however long one waits
    threading.Timer(0.3, before.close).start()
    _listening(where, 60.0).close()


def test_connections_of_a_replica_that_was_killed_do_not_keep_its_port():
    before = _listening(Where("127.0.0.1", 0), 0.0)
    where = Where(*before.getsockname())
    with socket.create_connection((where.host, where.port)):
        accepted, _ = before.accept()
        before.close()
        accepted.close()  # the server closes first, so its end lingers
        _listening(where, 0.0).close()


def test_only_a_lone_replica_of_ours_listens_itself(monkeypatch):
    lone = ServeSettings(models={"a": "a", "b": "b"})
    assert listens_itself(lone)
    for fields in (
        {"num_replicas": 2},
        {"autoscaling": {"max_replicas": 2}},
        {"engine": "vllm"},
        {"engine": "tensorrt_llm"},
    ):
        assert not listens_itself(ServeSettings.model_validate({"child": "a", **fields}))
    for name in ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_ENABLE_DIRECT_INGRESS", "RAY_SERVE_THROUGHPUT_OPTIMIZED"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "0")
            assert not listens_itself(lone)
