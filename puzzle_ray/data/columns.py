"""The text in a row: a column by its name or a dotted path, chat messages written out, and the words for what is no text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from puzzle_ray.data.foreign import reason_of
from puzzle_ray.errors import DataError

MISSING: Any = object()


def find(row: Any, path: str) -> Any:
    """The value at `path`, MISSING where there is none. A column whose own name has dots is found before a nested one."""
    if not isinstance(row, dict):
        return MISSING
    if path in row:
        return row[path]
    for index, letter in enumerate(path):
        if letter == "." and path[:index] in row:
            value = find(row[path[:index]], path[index + 1 :])
            if value is not MISSING:
                return value
    return MISSING


def columns_of(row: Any, before: str = "") -> Iterator[str]:
    """The paths of a row's columns, nested ones dotted."""
    for name, value in row.items():
        if isinstance(value, dict) and value:
            yield from columns_of(value, f"{before}{name}.")
        else:
            yield f"{before}{name}"


def type_of(value: Any) -> str:
    """What a value is, in a few words."""
    if isinstance(value, list):
        odd = next((each for each in value if not _is_message(each)), value[0]) if value else None
        return f"list of {type_of(odd)}" if value else "empty list"
    if isinstance(value, dict):
        return f"object with {', '.join(repr(str(name)) for name in list(value)[:6])}"
    if value is None:
        return "null"
    return {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "bytes": "binary"}.get(
        type(value).__name__, type(value).__name__
    )


def is_chat(value: Any) -> bool:
    """Whether this is a list of messages with `role` and `content`. A call of tools may have no content."""
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and "role" in value and ("content" in value or bool(value.get("tool_calls")))


def text_of(value: Any, tokenizer: Any, column: str, place: str, where: str) -> str:
    """The text of a value; "" where there is none. Raises DataError that names the type of anything else."""
    if value is MISSING or value is None or value == []:
        return ""
    if isinstance(value, str) or is_chat(value):
        text = value if isinstance(value, str) else _written_out(value, tokenizer, column, place, where)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                problem = f"{place}: {column!r} has half of a surrogate pair, which is no text"
                raise DataError(where, problem, "mend the row, or leave it out") from None
        return text
    remedy = "set data.text_column to a column of strings, or of chat messages (a list of objects with role and content)"
    raise DataError(where, f"{place}: column {column!r} holds {type_of(value)}, not text", remedy)


def _content(content: Any, column: str, place: str, where: str) -> str:
    """The content of a message as one string. A list of parts is joined: many templates write a list out as code, or not at all."""
    for part in content if isinstance(content, list) else [content]:
        text = isinstance(part, dict) and part.get("type", "text") in ("text", None) and isinstance(part.get("text"), str)
        if not isinstance(part, str) and not (text and isinstance(content, list)):
            kind = f"a part of type {part['type']!r}" if isinstance(part, dict) and part.get("type") else type_of(part)
            problem = f"{place}: a message in column {column!r} has {kind} for content, not text"
            raise DataError(where, problem, "write content as a string, or as parts like {type: text, text: ...}")
    return content if isinstance(content, str) else "".join(part if isinstance(part, str) else part["text"] for part in content)


def _written_out(messages: list[dict[str, Any]], tokenizer: Any, column: str, place: str, where: str) -> str:
    """By the tokenizer's chat template. The mark of beginning that some templates write is left to packing, which writes its own."""
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or "given"
        problem = f"{place}: column {column!r} holds chat messages, and the tokenizer {name!r} has no chat template"
        raise DataError(where, problem, "set data.text_column to a column of strings, or save a chat template with the parent")
    # what is null is not there: a template would write out the word None
    given = [{k: v for k, v in message.items() if v is not None} for message in messages]
    given = [message | {"content": _content(message.get("content", ""), column, place, where)} for message in given]
    try:
        text = str(tokenizer.apply_chat_template(given, tokenize=False))
    except Exception as error:  # a template is a program of its own
        problem = f"{place}: the tokenizer's chat template refuses column {column!r} ({reason_of(error)})"
        raise DataError(where, problem, "mend the row, or leave it out") from None
    return text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token else text
