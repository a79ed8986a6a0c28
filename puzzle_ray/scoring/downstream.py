"""Multiple choice by length-normalised log-likelihood, over .jsonl files of `query`, `choices` and `gold`.

The choices of a question are ranked by the mean log-probability of their tokens behind the query. There are two measures. Accuracy is
the share of questions where the gold choice ranks first. The gold log-probability is that of the gold choice under a softmax over the
mean log-probabilities of all choices; it is smooth, so it changes where the accuracy of a few questions does not.

Questions are in two halves, see `puzzle_ray.scoring.halves`. One half scores blocks. The other half is kept to test children on. A line
may have a `task`; each task is then split by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from puzzle_ray.data.files import find_files
from puzzle_ray.data.foreign import reading
from puzzle_ray.data.formats import is_text, rows
from puzzle_ray.errors import DataError
from puzzle_ray.models.head import Head
from puzzle_ray.models.rope import constant_up_to
from puzzle_ray.models.shards import states_of_batches
from puzzle_ray.models.tokenizer import tokenizer_of
from puzzle_ray.scoring.halves import HALVES, Half, halves, question_digest
from puzzle_ray.scoring.metrics import mean, next_ids, standard_error
from puzzle_ray.scoring.settings import ScoringConfig

__all__ = [
    "HALVES",
    "Half",
    "Question",
    "QuestionBatch",
    "answer_questions",
    "load_questions",
    "question_batches",
    "read_questions",
]

TEXTS_AT_ONCE = 1000  # of which a tokenizer holds all it knows

# R rows (a choice of a question each), T tokens, V vocabulary


@dataclass(frozen=True)
class Question:
    """`choices[gold]` is the right continuation of `query`; `gold` counts from 0. `task` names what it is a question of."""

    query: str
    choices: tuple[str, ...]
    gold: int
    task: str = ""


@dataclass(frozen=True)
class QuestionBatch:
    """Whole questions, one row per choice. Rows are padded on the right, where a causal model does not see the padding.

    `input_ids` is `[rows, tokens]`. The choice of row r is its tokens `first[r]` to `last[r]`, the latter exclusive. `sizes` has the
    number of rows of each question, and `gold` the number of its right choice.
    """

    input_ids: npt.NDArray[np.int64]
    first: tuple[int, ...]
    last: tuple[int, ...]
    sizes: tuple[int, ...]
    gold: tuple[int, ...]


@dataclass(frozen=True)
class Answers:
    """One value per question: 1 where the gold choice ranks first, and its log-probability among the choices, in nats."""

    correct: tuple[float, ...]
    gold_log_prob: tuple[float, ...]

    def summary(self) -> dict[str, float]:
        """Means and their standard errors over questions."""
        return {
            "accuracy": mean(self.correct),
            "accuracy_stderr": standard_error(self.correct),
            "gold_log_prob": mean(self.gold_log_prob),
            "gold_log_prob_stderr": standard_error(self.gold_log_prob),
            "questions": float(len(self.correct)),
        }


def read_questions(path: str, half: Half | None = None, limit: int | None = None) -> list[Question]:
    """The questions of a .jsonl file (a path or an fsspec URL, compressed or not), in order; `half` and `limit` select among them.

    Raises DataError where the file cannot be read, a line is no question, or nothing is selected.
    """
    where = "scoring.downstream"
    with reading(path, where, "name a .jsonl file"):
        files = find_files(path, where).files
        if len(files) != 1 or not files[0].is_json_lines:
            problem = (
                f"{path!r} names {len(files)} files" if len(files) > 1 else f"{path!r} cannot be read (no .jsonl file is there)"
            )
            raise DataError(where, problem, "name one .jsonl file")
        questions = [_parse_question(raw, f"{path}:{number}") for number, raw in rows(files[0], "query", where)]
    if half is not None:
        digests = [question_digest(question.query, question.choices) for question in questions]
        of = halves(digests, [question.task for question in questions])
        questions = [question for question, own in zip(questions, of, strict=True) if own == half]
    questions = questions[:limit]
    if not questions:
        words = "" if half is None else f" in the half to {half}, and each task is split by itself"
        raise DataError("scoring.downstream", f"{path!r} holds no question{words}", "write lines of query, choices and gold")
    return questions


def _parse_question(raw: Any, where: str) -> Question:
    remedy = 'write {"query": "...", "choices": ["...", "..."], "gold": 0}'
    if not isinstance(raw, dict):
        raise DataError("scoring.downstream", f"{where} is no question", remedy)
    if missing := [name for name in ("query", "choices", "gold") if name not in raw]:
        raise DataError("scoring.downstream", f"{where} is no question (without {' and '.join(missing)})", remedy)
    query, choices, gold = raw["query"], raw["choices"], raw["gold"]
    if not isinstance(query, str) or not is_text(query):
        raise DataError("scoring.downstream", f"{where}: query is {query!r}", "write it as a text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and is_text(c) and c for c in choices):
        remedy = "write a list of two texts or more, none of them empty"
        raise DataError("scoring.downstream", f"{where}: choices are {choices!r}", remedy)
    check_gold(gold, len(choices), where, "scoring.downstream")
    return Question(query, tuple(choices), gold, str(raw.get("task", "")))


def check_gold(gold: Any, choices: int, where: str, setting: str) -> None:
    """Raises DataError for what is no number of a choice."""
    if type(gold) is not int:
        raise DataError(setting, f"{where}: gold is {gold!r}", "write the number of the right choice, from 0, without quotes")
    if not 0 <= gold < choices:
        raise DataError(setting, f"{where}: gold {gold!r} among {choices} choices", "count gold from 0")


def question_batches(
    questions: Sequence[Question], tokenizer: Any, batch_tokens: int, max_tokens: int | None = None, border: int | None = None
) -> list[QuestionBatch]:
    """Padded batches of at most `batch_tokens` tokens, but of one question at least.

    A row is the query, a space and the choice. The choice begins where the row's tokens no longer equal those of the query alone. A
    row longer than `max_tokens` loses its beginning. `border`: the length up to which rotary frequencies are constant. No batch has
    questions on both sides of it, so what a question's rows give depends on the longest of its own rows, and on no other question.
    """
    batches: list[QuestionBatch] = []
    rows: list[tuple[list[int], int]] = []
    members: list[Question] = []
    for question, more in zip(questions, _rows_of(questions, tokenizer, max_tokens), strict=True):
        before, own = (max((len(ids) for ids, _ in some), default=0) for some in (rows, more))
        apart = border is not None and (before <= border) != (own <= border)
        if members and (apart or max(before, own) * (len(rows) + len(more)) > batch_tokens):
            batches.append(_padded_batch(rows, members))
            rows, members = [], []
        rows, members = rows + more, [*members, question]
    return [*batches, _padded_batch(rows, members)] if members else batches


def _rows_of(questions: Sequence[Question], tokenizer: Any, max_tokens: int | None) -> Iterator[list[tuple[list[int], int]]]:
    """The rows of each question."""
    texts = (text for q in questions for text in (q.query, *(f"{q.query} {choice}" for choice in q.choices)))
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    all_ids = ids_of(texts, tokenizer)
    for question in questions:
        context = start + next(all_ids)
        yield [_choice_row(context, start + next(all_ids), max_tokens) for _ in question.choices]


def ids_of(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """The token ids of each text, without special tokens. Many are tokenised at once: thousands of questions in parts of a second, not
    in seconds. Not all of them: a tokenizer holds far more of a text than its ids until it has done the last."""
    left = iter(texts)
    while some := list(islice(left, TEXTS_AT_ONCE)):
        yield from tokenizer(some, add_special_tokens=False)["input_ids"]


def _choice_row(context: list[int], whole: list[int], max_tokens: int | None) -> tuple[list[int], int]:
    """The token ids of a row, and where its choice begins: at the first token that is not the query's own."""
    same = 0
    while same < min(len(context), len(whole) - 1) and context[same] == whole[same]:
        same += 1
    cut = max(0, len(whole) - (max_tokens or len(whole)))
    return whole[cut:], max(1, same - cut)  # nothing stands before the first token to predict it from


def _padded_batch(rows: Sequence[tuple[list[int], int]], questions: Sequence[Question]) -> QuestionBatch:
    ids = np.zeros((len(rows), max(len(row) for row, _ in rows)), dtype=np.int64)
    for number, (row, _) in enumerate(rows):
        ids[number, : len(row)] = row
    return QuestionBatch(
        ids,
        tuple(first for _, first in rows),
        tuple(len(row) for row, _ in rows),
        tuple(len(question.choices) for question in questions),
        tuple(question.gold for question in questions),
    )


@torch.no_grad()
def answers_from_logits(logits_RTV: Tensor, batch: QuestionBatch) -> Answers:
    """The answers that the logits of a batch of questions give."""
    ids = torch.from_numpy(batch.input_ids.copy()).to(logits_RTV.device)
    log_probs = F.log_softmax(logits_RTV[:, :-1].float(), dim=-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return _answers(log_probs, batch)


@torch.no_grad()
def answers_from_head(head: Head, final_RTD: Tensor, batch: QuestionBatch) -> Answers:
    """The same from outputs of the final norm. Logits exist for a few tokens at a time."""
    ids_N = next_ids(torch.from_numpy(batch.input_ids.copy())).to(final_RTD.device).unsqueeze(-1)
    parts = [F.log_softmax(logits.float(), dim=-1).gather(-1, ids_N[part]) for part, logits in head.chunks(final_RTD)]
    return _answers(torch.cat(parts).view(final_RTD.shape[:2])[:, :-1], batch)


def _answers(log_probs: Tensor, batch: QuestionBatch) -> Answers:
    """From the log-probability of every next token, `[rows, tokens - 1]`."""
    means = torch.stack(
        [row[first - 1 : last - 1].mean() for row, first, last in zip(log_probs, batch.first, batch.last, strict=True)]
    )
    correct, gold_log_prob = [], []
    for of_choices, gold in zip(means.split(list(batch.sizes)), batch.gold, strict=True):
        correct.append(float(of_choices.argmax() == gold and not of_choices.isnan().any()))
        gold_log_prob.append(float(F.log_softmax(of_choices, dim=-1)[gold]))
    return Answers(tuple(correct), tuple(gold_log_prob))


@torch.inference_mode()
def answer_questions(model: Any, batches: Sequence[QuestionBatch]) -> Answers:
    """The answers of a causal language model of transformers to all questions."""
    head, ids = Head.of(model), [torch.from_numpy(batch.input_ids).to(model.device) for batch in batches]
    finals = states_of_batches(model, ids, [None] * len(ids))
    parts = [answers_from_head(head, final, batch) for final, batch in zip(finals, batches, strict=True)]
    return Answers(
        tuple(v for part in parts for v in part.correct),
        tuple(v for part in parts for v in part.gold_log_prob),
    )


def load_questions(
    parent: str, config: ScoringConfig, model_config: Any, half: Half = "score", trusted: bool = False
) -> list[QuestionBatch]:
    """One half of the questions of `scoring.downstream`, tokenised for the parent, whose config it is. Empty where it is not set.

    `trusted`: the tokenizer's own code may run. Raises DataError, also for tokens that the parent's embedding has no row for.
    """
    if config.downstream is None:
        return []
    return batches_for(tokenizer_of(parent, trusted), config, model_config, half)


def batches_for(tokenizer: Any, config: ScoringConfig, model_config: Any, half: Half) -> list[QuestionBatch]:
    """The same by the parent's tokenizer, where `scoring.downstream` is set."""
    where = "scoring.downstream"
    questions = read_questions(str(config.downstream), half, config.downstream_questions)
    positions = getattr(model_config, "max_position_embeddings", None)
    batches = question_batches(questions, tokenizer, config.micro_batch_tokens, positions, constant_up_to(model_config))
    largest = max(int(batch.input_ids.max()) for batch in batches)
    if largest >= model_config.vocab_size:
        token, rows = tokenizer.convert_ids_to_tokens(largest), model_config.vocab_size
        problem = f"a question has {token!r}, and the parent's embedding of {rows} rows none for that token ({largest})"
        raise DataError(where, problem, "leave the token out of the questions")
    return batches
