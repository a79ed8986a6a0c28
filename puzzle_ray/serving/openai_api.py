"""OpenAI's completions and chat completions on an `Engine`: request models, responses and errors, without a web framework.

A field that the engine cannot honour is refused, never ignored. Unknown fields are refused by name. Known fields are refused unless
they have the value that changes nothing (`n=1`, `logprobs=null`, ...). The fields `top_k` and `ignore_eos` are not OpenAI's.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import jinja2
from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import PreTrainedTokenizerBase

from puzzle_ray.errors import ConfigError, PuzzleError
from puzzle_ray.serving.engine import Engine
from puzzle_ray.serving.generation import EngineBusy, Generation, stream_deltas
from puzzle_ray.serving.sampling import SamplingParams

Json = dict[str, Any]

_DEFAULT_MAX_TOKENS = 16  # OpenAI's documented default for completions; chat has no default limit
_MAX_STOP_STRINGS = 4


class UnknownModel(PuzzleError):
    """`asked` is not the model `served` here."""

    def __init__(self, asked: str, served: str) -> None:
        super().__init__(asked, served)

    def __str__(self) -> str:
        asked, served = self.args
        return f"no model {asked!r} here; this server has {served!r}"


class StreamOptions(BaseModel):
    """`include_usage`: the stream ends with one more chunk, which has the token counts."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class GenerationRequest(BaseModel):
    """The fields that completions and chat completions share. null stands for a field's default."""

    model_config = ConfigDict(extra="forbid")

    # Known fields that the engine does not support, and the value of each that changes nothing.
    neutral: ClassVar[Json] = {"n": 1, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0}

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    user: str | None = None

    # These validators raise ConfigError, which pydantic passes on. It names the field, as OpenAI's errors do.

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_fields(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        for name in cls.neutral.keys() & fields.keys():
            if fields[name] is not None and fields[name] != cls.neutral[name]:
                raise ConfigError(name, f"{fields[name]!r} is not supported", "leave it out")
        return {name: value for name, value in fields.items() if name not in cls.neutral}

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ConfigError("stream_options", "is for streams", "send stream=true, or leave it out")
        return self

    def sampling_params(self) -> SamplingParams:
        """The request's sampling parameters. Raises ConfigError."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > _MAX_STOP_STRINGS:
            raise ConfigError("stop", f"holds {len(stop)} strings", f"give at most {_MAX_STOP_STRINGS}")
        given = self.model_dump(include={"temperature", "top_p", "top_k", "seed", "ignore_eos"}, exclude_none=True)
        return SamplingParams(max_tokens=self.token_limit(), stop=tuple(stop), **given)

    def token_limit(self) -> int | None:
        """The largest number of tokens to generate. None: as many as fit."""
        return self.max_tokens


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions: one text or token list, or several with one choice each."""

    neutral: ClassVar[Json] = {**GenerationRequest.neutral, "best_of": 1, "echo": False, "logprobs": None, "suffix": None}

    prompt: str | list[int] | list[str] | list[list[int]]

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """The token ids of each prompt. Text gets the tokenizer's own special tokens."""
        prompt: Any = self.prompt
        several = isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int))
        prompts = prompt if several else [prompt]
        return [list(tokenizer(one)["input_ids"]) if isinstance(one, str) else one for one in prompts]

    def token_limit(self) -> int | None:
        return _DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens


class ChatMessage(BaseModel):
    """One turn of a conversation, text only."""

    model_config = ConfigDict(extra="forbid")

    role: str
    content: str


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    neutral: ClassVar[Json] = {**GenerationRequest.neutral, "logprobs": False, "top_logprobs": None, "tools": [], "store": False}

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """The token ids of the conversation, up to the answer. Raises ConfigError if the chat template is missing or refuses it."""
        if tokenizer.chat_template is None:
            raise ConfigError("messages", "this model has no chat template", "use /v1/completions")
        turns = [message.model_dump() for message in self.messages]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:  # e.g. a template that wants user and assistant to alternate
            raise ConfigError("messages", f"the model's chat template refuses them: {error}") from error
        return [list(tokenizer(text, add_special_tokens=False)["input_ids"])]  # the template writes special tokens itself

    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class OpenAIService:
    """Answers requests for one model. It raises PuzzleErrors before the first token (see `error_response`)."""

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, model_name: str) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.created = int(time.time())

    def health(self) -> Json:
        """Body of GET /health, with the engine's counters. Raises EngineFailed if the engine has stopped."""
        self.engine.check()
        return {"status": "ok", **asdict(self.engine.stats())}

    def models(self) -> Json:
        """Body of GET /v1/models."""
        model = {"id": self.model_name, "object": "model", "created": self.created, "owned_by": "puzzle_ray"}
        return {"object": "list", "data": [model]}

    def submit(self, request: CompletionRequest | ChatRequest) -> list[Generation]:
        """Start one generation per prompt. On an error none is left. Raises UnknownModel, ConfigError, EngineBusy, EngineFailed."""
        if request.model != self.model_name:
            raise UnknownModel(request.model, self.model_name)
        params = request.sampling_params()
        prompts = request.prompts(self.tokenizer)
        if not prompts:
            raise ConfigError("prompt", "is empty", "give a text or a list of token ids")
        generations: list[Generation] = []
        try:
            for prompt_ids in prompts:
                generations.append(self.engine.submit(prompt_ids, params))
        except PuzzleError:
            for generation in generations:
                generation.cancel()
            raise
        return generations

    async def answer(self, request: CompletionRequest | ChatRequest) -> Json:
        """The whole response. Where this call is cancelled, because the client has gone, the slots are freed."""
        generations = self.submit(request)
        async for _ in stream_deltas(generations):
            pass
        shape = _Shape(request, self.model_name)
        choices = [shape.choice(index, each.text, each.finish_reason) for index, each in enumerate(generations)]
        return {**shape.head(), "choices": choices, "usage": _usage(generations)}

    def answer_stream(self, request: CompletionRequest | ChatRequest) -> AsyncIterator[str]:
        """Server-sent events, one per piece of text. Errors are raised before the first event. Closing the iterator frees the slots."""
        return self._events(request, self.submit(request))

    async def _events(self, request: CompletionRequest | ChatRequest, generations: Sequence[Generation]) -> AsyncIterator[str]:
        shape = _Shape(request, self.model_name, chunks=True)
        usage = request.stream_options is not None and request.stream_options.include_usage
        # With `include_usage`, every chunk has the field `usage`. It is null except in the last chunk.
        head = {**shape.head(), "usage": None} if usage else shape.head()
        try:
            async with contextlib.aclosing(stream_deltas(generations)) as deltas:
                async for index, delta in deltas:
                    if delta.text or delta.finish_reason:
                        yield _event({**head, "choices": [shape.choice(index, delta.text, delta.finish_reason)]})
            if usage:
                yield _event({**head, "choices": [], "usage": _usage(generations)})
        except PuzzleError as error:  # the status line was sent already, so the error becomes the last event
            yield _event(error_response(error)[1])
        yield "data: [DONE]\n\n"


class _Shape:
    """How completions, chat completions and their chunks write the same content."""

    def __init__(self, request: CompletionRequest | ChatRequest, model_name: str, chunks: bool = False) -> None:
        self.chat, self.chunks = isinstance(request, ChatRequest), chunks
        kind = "chat.completion" if self.chat else "text_completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": f"{kind}.chunk" if self.chat and chunks else kind,
            "created": int(time.time()),
            "model": model_name,
        }
        self._begun: set[int] = set()

    def head(self) -> Json:
        """The fields before `choices`."""
        return dict(self._head)

    def choice(self, index: int, text: str, finish_reason: str | None) -> Json:
        """One entry of `choices`. A chat's first chunk names the role."""
        end = {"index": index, "logprobs": None, "finish_reason": finish_reason}
        if not self.chat:
            return {"text": text, **end}
        message = {"content": text} if index in self._begun else {"role": "assistant", "content": text}
        self._begun.add(index)
        return {"delta" if self.chunks else "message": message, **end}


def _usage(generations: Sequence[Generation]) -> Json:
    prompt = sum(len(generation.prompt_ids) for generation in generations)
    completion = sum(len(generation.token_ids) for generation in generations)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _event(body: Json) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def error_response(error: PuzzleError) -> tuple[int, Json]:
    """HTTP status and OpenAI-shaped body: 400 for the request, 404 for the model, 503 when busy, 500 for the rest."""
    if isinstance(error, UnknownModel):
        return 404, error_body(str(error), param="model", code="model_not_found")
    if isinstance(error, ConfigError):
        return 400, error_body(str(error), param=str(error.args[0]))
    if isinstance(error, EngineBusy):
        return 503, error_body(str(error), kind="server_error", code="engine_busy")
    return 500, error_body(str(error), kind="server_error")


def error_body(message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None) -> Json:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def validation_body(errors: Sequence[Json]) -> Json:
    """Body (for status 400) from pydantic's list of errors: the first wrong field, with all messages about it."""
    # A web framework puts "body" before the path. A body that is not an object has no path.
    paths = [[str(part) for part in error["loc"] if part != "body"] for error in errors]
    param = paths[0][0] if paths[0] else None
    if errors[0]["type"] == "extra_forbidden":
        where = ".".join(paths[0])
        return error_body(f"{where}: unknown or unsupported field; leave it out", param=where, code="unknown_field")
    messages = [error["msg"] for error, path in zip(errors, paths, strict=True) if path[:1] == paths[0][:1]]
    message = " or ".join(dict.fromkeys(messages))
    return error_body(f"{param}: {message}" if param else message, param=param)
