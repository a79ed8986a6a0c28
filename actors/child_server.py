"""Children behind HTTP: FastAPI routes under Ray Serve on one engine per model. What they answer is `OpenAIService`'s matter."""

import asyncio
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from ray import serve
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from actors.direct_http import DirectHttp, Where
from puzzle_ray.errors import PuzzleError
from puzzle_ray.serving.access import KeyCheck, read_body, without_end_slash
from puzzle_ray.serving.api_errors import error_body, error_headers, error_response, validation_body
from puzzle_ray.serving.metrics import CONTENT_TYPE
from puzzle_ray.serving.openai_api import OpenAIService, ServedModel
from puzzle_ray.serving.requests import ChatRequest, CompletionRequest, parse
from puzzle_ray.serving.settings import ServeSettings

Body = TypeVar("Body", CompletionRequest, ChatRequest)

_LARGE_BODY = 1 << 17  # bytes
_READ = ["GET", "HEAD"]
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass on each event as it comes

app = FastAPI(title="puzzle_ray", redirect_slashes=False)


class _Access:
    """Keys and origins, as the settings of this process' replica have them. They are known when the first request comes."""

    def __init__(self, inner: ASGIApp) -> None:
        self._inner = inner
        self._chain: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        scope["path"] = without_end_slash(scope["path"], scope.get("root_path", ""))
        if self._chain is None:
            settings = serve.get_replica_context().servable_object.settings
            self._chain = KeyCheck(self._inner, settings.api_key_sha256)
            if settings.allowed_origins:
                allowed = {"allow_origins": settings.allowed_origins, "allow_methods": ["*"], "allow_headers": ["*"]}
                self._chain = CORSMiddleware(self._chain, **allowed)
        await self._chain(scope, receive, send)


app.add_middleware(_Access)


@app.exception_handler(PuzzleError)
async def _puzzle_error(request: Request, error: PuzzleError) -> JSONResponse:
    status, body = error_response(error)
    return JSONResponse(body, status, headers=error_headers(status))


@app.exception_handler(ValidationError)
async def _invalid_body(request: Request, error: ValidationError) -> JSONResponse:
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    return JSONResponse(validation_body([dict(each) for each in errors]), 400)


@app.exception_handler(HTTPException)
async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    body = error_body(f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(body, error.status_code, headers=error.headers)  # a 405 says what is allowed


@app.exception_handler(Exception)
async def _fault(request: Request, error: Exception) -> JSONResponse:
    """Of a fault of ours. It is raised again afterwards, so the log has it."""
    return JSONResponse(error_body(f"the server failed: {type(error).__name__}", kind="server_error"), 500)


class _EventStream(StreamingResponse):
    """Sends and does not listen: whatever receives the requests cancels the task when the client is gone, and that frees the slot."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.stream_response(send)


@serve.deployment(name="ChildServer", max_constructor_retry_count=1, graceful_shutdown_wait_loop_s=0.5)
@serve.ingress(app)
class ChildServer:
    """One replica: the models in memory, their engines, and the routes. `settings`: the fields of ServeSettings.

    It listens at `where` itself; without that, Serve's proxy passes requests on to it.
    """

    def __init__(self, settings: dict[str, Any], where: Where | None = None) -> None:
        self._engines: list[Any] = []
        self._http: DirectHttp | None = None
        self.settings = ServeSettings.model_validate(settings)
        self.service = OpenAIService(
            [self._load(name, folder) for name, folder in self.settings.models.items()],
            self.settings.stream_interval_ms / 1000,
        )
        if where is not None:
            self._http = DirectHttp(where, self.settings)

    def _load(self, name: str, model: str) -> ServedModel:
        import torch

        from puzzle_ray.models.child import load_model
        from puzzle_ray.models.tokenizer import read_tokenizer
        from puzzle_ray.process import compute_with, device_for
        from puzzle_ray.serving.engine import Engine
        from puzzle_ray.serving.fetch import fetch_model, read_sampling_defaults
        from puzzle_ray.serving.limits import free_memory_bytes

        asked = self.settings
        compute_with(asked.num_cpus)
        folder, device = fetch_model(model), device_for(asked.num_gpus)
        defaults = read_sampling_defaults(folder) if asked.generation_config == "auto" else None
        loaded = load_model(folder, dtype=None if asked.dtype == "auto" else getattr(torch, asked.dtype)).to(device)
        tokenizer = read_tokenizer(folder)  # type: ignore[arg-type]
        left = len(asked.models) - len(
            self._engines
        )  # of the memory that is free now, each model yet to come gets an equal share
        engine = Engine(
            loaded,
            tokenizer,
            max_batch_size=asked.max_batch_size,
            max_length=asked.max_length or None,
            max_waiting=asked.max_waiting,
            prefill_tokens=asked.prefill_tokens,
            kv_cache_mib=asked.kv_cache_mib / len(asked.models) or free_memory_bytes(device) / left / 2**20,
            prefix_cache=asked.prefix_cache,
            stall_timeout_s=asked.stall_timeout_s,
        ).start()
        self._engines.append(engine)
        return ServedModel(name, engine, tokenizer, defaults)

    async def __del__(self) -> None:
        if self._http is not None:
            await self._http.stop()
        for engine in self._engines:
            engine.close()

    def check_health(self) -> None:
        """Serve replaces the replica when this raises: an engine or the HTTP server has stopped, or a forward pass does not end."""
        self.service.check()
        if self._http is not None:
            self._http.check()

    @app.api_route("/health", methods=_READ)
    async def health(self) -> dict[str, Any]:
        """Whether requests are served, and the engines' counters."""
        return self.service.health()

    @app.api_route("/metrics", methods=_READ)
    async def metrics(self) -> Response:
        """Counters and histograms of this replica, for Prometheus."""
        replica = serve.get_replica_context().replica_tag
        return Response(self.service.metrics({"replica": replica}), media_type=CONTENT_TYPE)

    @app.api_route("/v1/models", methods=_READ)
    async def models(self) -> dict[str, Any]:
        """The models there are."""
        return self.service.models()

    @app.api_route("/v1/models/{name:path}", methods=_READ)
    async def model(self, name: str) -> dict[str, Any]:
        """One model."""
        return self.service.model(name).card()

    @app.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        """Continue a text."""
        return await self._reply(await self._read(CompletionRequest, request))

    @app.post("/v1/chat/completions")
    async def chat_completions(self, request: Request) -> Response:
        """Answer in a conversation, for models with a chat template."""
        return await self._reply(await self._read(ChatRequest, request))

    async def _read(self, kind: type[Body], request: Request) -> Body:
        most_bytes = int(self.settings.max_body_mib * 2**20)
        body = await read_body(request.headers, request.receive, most_bytes, self.settings.body_timeout_s)
        if len(body) < _LARGE_BODY:
            return parse(kind, body)
        return await asyncio.to_thread(parse, kind, body)  # a hundred thousand messages take seconds, in which others are served

    async def _reply(self, request: CompletionRequest | ChatRequest) -> Response:
        if request.stream:
            return _EventStream(
                await self.service.answer_stream(request), headers=_STREAM_HEADERS, media_type="text/event-stream"
            )
        return JSONResponse(await self.service.answer(request))
