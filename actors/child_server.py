"""A child behind HTTP: FastAPI routes under Ray Serve on one engine per replica. What they answer is `OpenAIService`'s matter."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from puzzle_ray.errors import PuzzleError
from puzzle_ray.serving.openai_api import (
    ChatRequest,
    CompletionRequest,
    OpenAIService,
    error_body,
    error_response,
    validation_body,
)

app = FastAPI(title="puzzle_ray")


@app.exception_handler(PuzzleError)
async def _puzzle_error(request: Request, error: PuzzleError) -> JSONResponse:
    status, body = error_response(error)
    return JSONResponse(body, status, headers={"Retry-After": "1"} if status == 503 else None)


@app.exception_handler(RequestValidationError)
async def _invalid_body(request: Request, error: RequestValidationError) -> JSONResponse:
    return JSONResponse(validation_body(error.errors()), 400)


@app.exception_handler(HTTPException)
async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    return JSONResponse(error_body(f"{request.method} {request.url.path}: {error.detail}"), error.status_code)


class _EventStream(StreamingResponse):
    """Sends and does not listen: Serve itself cancels the task when the client is gone, and that frees the slot."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.stream_response(send)


@serve.deployment(max_constructor_retry_count=1, graceful_shutdown_wait_loop_s=0.5, graceful_shutdown_timeout_s=10)
@serve.ingress(app)
class ChildServer:
    """One replica: a model in memory, its engine, and the routes."""

    def __init__(
        self,
        child: str,
        model_name: str,
        device: str,
        dtype: str,
        max_batch_size: int,
        max_length: int | None,
        max_waiting: int,
    ) -> None:
        import ray
        import torch
        from transformers import AutoTokenizer

        from puzzle_ray.models.child import load_model
        from puzzle_ray.process import compute_with
        from puzzle_ray.serving.engine import Engine
        from puzzle_ray.serving.fetch import fetch_model

        compute_with(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
        folder = fetch_model(child)
        model = load_model(folder, dtype=None if dtype == "auto" else getattr(torch, dtype)).to(device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.engine = Engine(
            model, tokenizer, max_batch_size=max_batch_size, max_length=max_length, max_waiting=max_waiting
        ).start()
        self.service = OpenAIService(self.engine, tokenizer, model_name)

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        self.engine.check()

    @app.get("/health")
    async def health(self) -> dict[str, Any]:
        """Whether requests are served, and the engine's counters."""
        return self.service.health()

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The one model there is."""
        return self.service.models()

    @app.post("/v1/completions")
    async def completions(self, request: CompletionRequest) -> Response:
        """Continue a text."""
        return await self._reply(request)

    @app.post("/v1/chat/completions")
    async def chat_completions(self, request: ChatRequest) -> Response:
        """Answer in a conversation, for models with a chat template."""
        return await self._reply(request)

    async def _reply(self, request: CompletionRequest | ChatRequest) -> Response:
        if request.stream:
            return _EventStream(self.service.answer_stream(request), media_type="text/event-stream")
        return JSONResponse(await self.service.answer(request))
