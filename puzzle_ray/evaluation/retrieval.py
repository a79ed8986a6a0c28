"""Retrieval from long context, in the style of RULER (arXiv 2404.06654): numbers hidden in noise, to be found again. Made from nothing.

A text of repeated sentences hides lines such as `One of the special magic numbers for calm-river is: 4821907.` At its end a question asks
for some of them. There are two measures. Recall, as RULER has it, is the share of the numbers asked for that occur in the greedy answer.
The choice is whether the right number is the most likely one of four, which says something of models that are too small to answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from puzzle_ray.errors import DataError
from puzzle_ray.evaluation.requests import Answer, Chunk, Continuations, Ids, Likelihoods, chunked, joined

NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
ADJECTIVES = ("calm", "bright", "quiet", "early", "green", "hollow", "little", "mellow", "narrow", "proud", "rough", "silent")
NOUNS = ("river", "garden", "window", "candle", "forest", "harbor", "island", "ladder", "meadow", "mirror", "orchard", "valley")
DIGITS = 7
CHOICES = 4
ANSWER_TOKENS = 48  # for every number that is asked for


@dataclass(frozen=True)
class Kind:
    """`keys` names with `values` numbers each are hidden, and the numbers of `asked` of the names are asked for."""

    name: str
    keys: int
    values: int
    asked: int


KINDS = (Kind("single", 1, 1, 1), Kind("multi_key", 4, 1, 1), Kind("multi_value", 1, 4, 1), Kind("multi_query", 4, 1, 4))


@dataclass(frozen=True)
class Needles:
    """One question. `depth`: where the first number asked for stands, 0 is the beginning of the text and 1 its end."""

    kind: str
    tokens: int
    depth: float
    prompt: Ids
    expected: tuple[str, ...]
    choices: tuple[Ids, ...]  # one number asked for is the first of them; the others are not asked for


@dataclass(frozen=True)
class _Drawn:
    """What one question hides and asks for, before it has a text."""

    lines: tuple[str, ...]
    question: str
    expected: tuple[str, ...]
    others: tuple[str, ...]  # numbers that are not asked for

    def text(self, sentences: int, depth: float) -> str:
        """With so many sentences of noise."""
        return f"{_hidden_in(sentences, self.lines, depth)}\n{self.question}"

    def least(self, tokenizer: Any) -> int:
        """Tokens that it takes without any noise, the answer's included."""
        return len(_ids(tokenizer, self.text(0, 0.0))) + ANSWER_TOKENS * len(self.expected)


def make_questions(tokenizer: Any, lengths: Sequence[int], depths: int, each: int, seed: int) -> list[Needles]:
    """`each` questions of every kind, length (tokens of prompt and answer together) and depth.

    Every question is a function of the seed and its place in the list. Raises DataError as `check_lengths`.
    """
    check_lengths(tokenizer, lengths, depths, each, seed)
    found = []
    for kind in KINDS:
        for tokens in lengths:
            for (step, _), drawn in _all_drawn(kind, tokens, depths, each, seed):
                depth = step / (depths - 1) if depths > 1 else 0.5
                found.append(_question(tokenizer, kind, tokens, depth, drawn))
    return found


def check_lengths(
    tokenizer: Any, lengths: Sequence[int], depths: int, each: int, seed: int, positions: int | None = None
) -> None:  # fmt: skip
    """Raises DataError for lengths that not even the questions fit, with what every such kind takes, and what holds all of them.

    `positions` are the parent's, where it has a limit.
    """

    def takes(kind: Kind, tokens: int) -> int:
        return max(drawn.least(tokenizer) for _, drawn in _all_drawn(kind, tokens, depths, each, seed))

    takes_most: dict[str, int] = {}
    failing = set()
    for kind in KINDS:
        found = {tokens: takes(kind, tokens) for tokens in lengths}
        if too_small := [tokens for tokens in found if found[tokens] > tokens]:
            takes_most[kind.name] = max(found[tokens] for tokens in too_small)
            failing.update(too_small)
    if not failing:
        return
    enough = max(takes_most.values())
    while any(takes(kind, enough) > enough for kind in KINDS):  # every length draws its own numbers
        enough += 1
    kinds = ", ".join(f"{name} takes {needed}" for name, needed in takes_most.items())
    problem = f"{' and '.join(map(str, sorted(failing)))} tokens do not hold a question of every kind: {kinds}"
    remedy = f"ask for at least {enough} tokens, which hold all kinds"
    if positions is not None and enough > positions:
        remedy = f"leave it empty: all kinds take {enough} tokens, and the parent has {positions} positions"
    raise DataError("evaluate.retrieval_tokens", problem, remedy)


def _all_drawn(kind: Kind, tokens: int, depths: int, each: int, seed: int) -> Iterator[tuple[tuple[int, int], _Drawn]]:
    """All questions of a kind and length, by (depth, number)."""
    for step in range(depths):
        for number in range(each):
            yield (step, number), _drawn(kind, np.random.default_rng([seed, KINDS.index(kind), tokens, step, number]))


def _drawn(kind: Kind, generator: np.random.Generator) -> _Drawn:
    order = generator.permutation(len(ADJECTIVES) * len(NOUNS))[: kind.keys]
    keys = [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in order]
    least_number = 10 ** (DIGITS - 1)
    drawn = generator.choice(9 * least_number, kind.keys * kind.values + CHOICES, replace=False)
    numbers = [str(least_number + int(number)) for number in drawn]
    hidden = [(key, numbers[i * kind.values + v]) for i, key in enumerate(keys) for v in range(kind.values)]
    asked = keys[: kind.asked]
    expected = tuple(value for key, value in hidden if key in asked)
    lines = tuple(f"One of the special magic numbers for {key} is: {value}." for key, value in hidden)
    others = [value for _, value in hidden if value not in expected] + numbers[-CHOICES:]
    plural, names = ("s", ", ".join(asked)) if len(expected) > 1 else ("", asked[0])
    are = "are" if plural else "is"
    question = f"What {are} the special magic number{plural} for {names} mentioned in the text above?"
    question += f" The special magic number{plural} for {names} mentioned in the text above {are}"
    return _Drawn(lines, question, expected, tuple(others))


def _question(tokenizer: Any, kind: Kind, tokens: int, depth: float, drawn: _Drawn) -> Needles:
    """With as much noise as there is room for. `tokens` hold the question."""
    room = tokens - ANSWER_TOKENS * len(drawn.expected)

    def prompt(sentences: int) -> Ids:
        return _ids(tokenizer, drawn.text(sentences, depth))

    per_sentence = len(_ids(tokenizer, " ".join(NOISE))) / len(NOISE)
    sentences = int((room - len(prompt(0))) / per_sentence) + 1
    while len(prompt(sentences)) > room:
        sentences -= max(1, int((len(prompt(sentences)) - room) / per_sentence))
    text = drawn.text(sentences, depth)
    choices = tuple(_continuation(tokenizer, text, value) for value in (drawn.expected[0], *drawn.others[: CHOICES - 1]))
    return Needles(kind.name, tokens, depth, _ids(tokenizer, text), drawn.expected, choices)


def _hidden_in(sentences: int, lines: Sequence[str], depth: float) -> str:
    """Noise with the lines in it: the first at `depth`, the others evenly spread from there on, around the end."""
    noise = [NOISE[i % len(NOISE)] for i in range(sentences)]
    places = [round(((depth + i / len(lines)) % 1.0 if i else depth) * sentences) for i in range(len(lines))]
    for place, line in sorted(zip(places, lines, strict=True), key=lambda pair: -pair[0]):
        noise.insert(place, line)
    return " ".join(noise)


def _ids(tokenizer: Any, text: str) -> Ids:
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return (*start, *tokenizer(text, add_special_tokens=False)["input_ids"])


def _continuation(tokenizer: Any, text: str, value: str) -> Ids:
    """The tokens of a number behind the text. At least its last one, where a tokenizer joins them to what stands before."""
    context, whole = _ids(tokenizer, text), _ids(tokenizer, f"{text} {value}")
    return whole[min(len(context), len(whole) - 1) :]


def retrieval_chunks(questions: Sequence[Needles]) -> list[Chunk]:
    """All that a model is asked: first the choices, then the answers."""
    pairs = [(question.prompt, choice) for question in questions for choice in question.choices]
    chunks: list[Chunk] = [Likelihoods(part) for part in chunked(pairs)]
    for count in sorted({len(question.expected) for question in questions}):
        prompts = [question.prompt for question in questions if len(question.expected) == count]
        chunks += [Continuations(part, ANSWER_TOKENS * count) for part in chunked(prompts)]
    return chunks


def retrieval_scores(questions: Sequence[Needles], answers: Sequence[Answer], tokenizer: Any) -> list[tuple[float, float]]:
    """(recall, choice) of every question, from the answers to `retrieval_chunks`."""
    found = iter(answers)
    count = len(list(chunked(range(sum(len(question.choices) for question in questions)))))
    log_prob = joined([next(found) for _ in range(count)], "log_prob")
    texts: dict[int, str] = {}
    for size in sorted({len(question.expected) for question in questions}):
        numbers = [i for i, question in enumerate(questions) if len(question.expected) == size]
        for part in chunked(numbers):
            answer = next(found)
            for i, ids, length in zip(part, answer["ids"], answer["length"], strict=True):
                texts[i] = str(tokenizer.decode(ids[:length].tolist(), skip_special_tokens=True))
    scores = []
    for i, question in enumerate(questions):
        own = log_prob[CHOICES * i : CHOICES * (i + 1)]
        recall = sum(value in texts[i] for value in question.expected) / len(question.expected)
        scores.append((recall, float(own[0] > own[1:].max())))  # not where a model tells two numbers apart no more than one
    return scores


def retrieval_table(questions: Sequence[Needles], scores: Mapping[str, Sequence[tuple[float, float]]]) -> list[dict[str, Any]]:
    """A row for every kind and length, and one for every depth of it: `kind`, `tokens`, `depth` (None: all), `questions`, `models`."""
    rows: list[dict[str, Any]] = []
    for kind, tokens in dict.fromkeys((question.kind, question.tokens) for question in questions):
        own = [i for i, question in enumerate(questions) if (question.kind, question.tokens) == (kind, tokens)]
        for depth in (None, *dict.fromkeys(questions[i].depth for i in own)):
            inside = [i for i in own if depth is None or questions[i].depth == depth]
            models = {name: _means([of[i] for i in inside]) for name, of in scores.items()}
            rows.append({"kind": kind, "tokens": tokens, "depth": depth, "questions": len(inside), "models": models})
    return rows


def _means(scores: Sequence[tuple[float, float]]) -> dict[str, float]:
    values: npt.NDArray[np.float64] = np.asarray(scores, np.float64).mean(axis=0)
    return {"recall": float(values[0]), "choice": float(values[1])}
