"""Files of questions for `evaluate.tasks`: their lines, and what is wrong with them. Needs no lm_eval; `harness.py` makes tasks of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from puzzle_ray.data.files import find_files
from puzzle_ray.data.foreign import reading
from puzzle_ray.data.formats import is_text, rows
from puzzle_ray.errors import DataError
from puzzle_ray.evaluation.task_names import WHERE, is_questions
from puzzle_ray.scoring.downstream import check_gold, ids_of

TEXTS = {"query", "context", "continuation"}  # fields of questions that hold a text,
OPTIONS = {"choices", "context_options"}  # and a list of texts to choose from
KINDS = (("query", "choices", "gold"), ("context_options", "continuation", "gold"), ("context", "continuation"))


def kind_of(row: Mapping[str, Any], path: str) -> tuple[str, ...]:
    """Which of `KINDS` a question is, by its fields; it may have others besides. Raises DataError where it is none."""
    for kind in KINDS:
        if row.keys() >= set(kind):
            return kind
    problem = f"{path!r} has lines of {', '.join(sorted(row)) or 'nothing'}"
    raise DataError(WHERE, problem, f"write {'; or '.join(map(', '.join, KINDS))}")


def read_lines(path: str) -> list[dict[str, Any]]:
    """All lines, which have the same keys, those of one of `KINDS` among them. Raises DataError."""
    remedy = "name one .jsonl file of questions"
    with reading(path, WHERE, remedy):
        files = find_files(path, WHERE).files
        if len(files) != 1 or not files[0].is_json_lines:
            problem = f"{path!r} names {len(files)} .jsonl files" if files else f"there is no file {path!r}"
            raise DataError(WHERE, problem, remedy)
        found = list(rows(files[0], "query", WHERE))
    for number, row in found:
        if not isinstance(row, dict):
            raise DataError(
                WHERE, f"{path}:{number} is no question", "write a JSON object with the question's fields in every line"
            )
        if set(row) != set(found[0][1]):
            raise DataError(WHERE, f"{path}:{number} has other fields than the first line", "write the same fields in every line")
        kind_of(row, path)
        _check_question(row, f"{path}:{number}")
    if not found:
        raise DataError(WHERE, f"{path!r} holds no question", "write one in every line")
    return [row for _, row in found]


def _check_question(row: Mapping[str, Any], where: str) -> None:
    """Raises DataError for values that lm_eval would stumble over, or take for something else."""
    for name in TEXTS & set(row):
        if not isinstance(row[name], str) or not is_text(row[name]):
            raise DataError(WHERE, f"{where}: {name} is {row[name]!r}", "write it as a text")
    if row.get("continuation") == "":
        raise DataError(WHERE, f"{where}: continuation is empty", "write what is to be foretold, or leave the line out")
    for name in OPTIONS & set(row):
        options, gold = row[name], row.get("gold")
        if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and is_text(o) and o for o in options):
            raise DataError(WHERE, f"{where}: {name} are {options!r}", "write a list of two texts or more, none of them empty")
        check_gold(gold, len(options), where, WHERE)


def check_texts(names: Sequence[str], tokenizer: Any, model_config: Any, limit: int | None = None) -> None:
    """Raises DataError for questions in files that a model of this vocabulary and so many positions cannot be asked.

    With `limit` the first ones of every file are looked at: no others are asked.
    """
    positions, num_rows = getattr(model_config, "max_position_embeddings", None), model_config.vocab_size
    for name in filter(is_questions, names):
        asked = read_lines(name)[:limit]
        texts = [[text for key in sorted(TEXTS | OPTIONS) for text in _texts(row.get(key))] for row in asked]
        all_ids = ids_of((f" {text}" for own in texts for text in own), tokenizer)
        for number, (row, own) in enumerate(zip(asked, texts, strict=True), 1):
            place, last = f"question {number} of {name!r}", row.get("choices", [row.get("continuation")])
            for text, ids in zip(own, all_ids, strict=False):  # `own` ends first
                remedy = "leave the question out"
                if ids and max(ids) >= num_rows:
                    token = tokenizer.convert_ids_to_tokens(max(ids))
                    problem = f"{place} has {token!r}, and the parent's embedding of {num_rows} rows none for that token"
                    raise DataError(WHERE, problem, remedy)
                if text in last and positions is not None and len(ids) > positions + 1:  # one may belong to what stands before
                    problem = (
                        f"{place} has {text[:30]!r}... of {len(ids)} tokens to foretell, and the parent {positions} positions"
                    )
                    raise DataError(WHERE, problem, remedy)


def _texts(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value] if isinstance(value, str) else []
