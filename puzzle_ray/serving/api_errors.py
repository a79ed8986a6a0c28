"""Errors as OpenAI's clients read them: a status and a body for everything that a request can meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from puzzle_ray.errors import ConfigError, PuzzleError
from puzzle_ray.serving.generation import EngineBusy
from puzzle_ray.serving.limits import TooLong

Json = dict[str, Any]


class UnknownModel(PuzzleError):
    """`asked` is none of the models `served` here (their names, in one text)."""

    def __init__(self, asked: str, served: str) -> None:
        super().__init__(asked, served)

    def __str__(self) -> str:
        asked, served = self.args
        return f"no model {asked!r} here; this server has {served}"


class BodyRefused(PuzzleError):
    """A body that is not read to its end: `status` is HTTP's, `problem` says why."""

    def __init__(self, status: int, problem: str) -> None:
        super().__init__(status, problem)

    def __str__(self) -> str:
        return str(self.args[1])


class KeyRefused(PuzzleError):
    """A request without a key, or with one that is not known."""

    def __str__(self) -> str:
        return "this server wants an API key: send `Authorization: Bearer KEY` with a key that it knows"


def error_response(error: PuzzleError) -> tuple[int, Json]:
    """HTTP status and OpenAI-shaped body: 400 for the request, 401 for the key, 404 for the model, 503 when busy, 500 for the rest."""
    if isinstance(error, UnknownModel):
        return 404, error_body(str(error), param="model", code="model_not_found")
    if isinstance(error, BodyRefused):
        return int(error.args[0]), error_body(str(error))
    if isinstance(error, KeyRefused):
        return 401, error_body(str(error), code="invalid_api_key")
    if isinstance(error, ConfigError):
        code = "context_length_exceeded" if isinstance(error, TooLong) else None  # clients shorten the conversation then
        return 400, error_body(str(error), param=str(error.args[0]), code=code)
    if isinstance(error, EngineBusy):
        return 503, error_body(str(error), kind="server_error", code="engine_busy")
    return 500, error_body(str(error), kind="server_error")


def error_headers(status: int) -> dict[str, str] | None:
    """Headers that belong to a status."""
    return {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(status)


def error_body(message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None) -> Json:
    """An error as OpenAI's clients read it. What a client sent and no encoding can say (half a surrogate pair) becomes `?`."""
    said, where = (None if text is None else text.encode("utf-8", "replace").decode() for text in (message, param))
    return {"error": {"message": said, "type": kind, "param": where, "code": code}}


def validation_body(errors: Sequence[Json]) -> Json:
    """Body (for status 400) from pydantic's list of errors: the first wrong field, with all messages about it."""
    paths = [[str(part) for part in error["loc"]] for error in errors]
    param = paths[0][0] if paths[0] else None
    if errors[0]["type"] == "extra_forbidden":
        where = ".".join(paths[0])
        return error_body(f"{where}: unknown or unsupported field; leave it out", param=where, code="unknown_field")
    messages = [error["msg"] for error, path in zip(errors, paths, strict=True) if path[:1] == paths[0][:1]]
    message = " or ".join(dict.fromkeys(messages))
    return error_body(f"{param}: {message}" if param else message, param=param)
