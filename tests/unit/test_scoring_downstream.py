"""Multiple choice: the numbers are those of each row alone, halves are disjoint, and an exchange costs the gold choice what it costs."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from serving_models import longrope_model
from small_models import tiny_config
from torch.nn import functional as F

from puzzle_ray.artifacts import KINDS, PARENT, LayerChoice
from puzzle_ray.errors import DataError
from puzzle_ray.models.blocks import load_stack
from puzzle_ray.models.child import assemble, load_model, read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.progress import Quiet
from puzzle_ray.scoring.downstream import (
    TEXTS_AT_ONCE,
    Question,
    QuestionBatch,
    answer_questions,
    answers_from_logits,
    batches_for,
    load_questions,
    question_batches,
    read_questions,
)
from puzzle_ray.scoring.halves import halves, question_digest
from puzzle_ray.scoring.metrics import mean
from puzzle_ray.scoring.serial import score_serially
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space


class Letters:
    """Every character is a token."""

    bos_token_id = 0

    def __init__(self):
        self.calls = 0

    def __call__(self, texts, **_):
        self.calls += 1
        return {"input_ids": [[1 + ord(c) % 90 for c in text] for text in texts]}


QUESTIONS = [
    Question("What is it", ("a cat", "a small dog", "b"), 1),
    Question("Where", ("here", "nowhere at all"), 0),
    Question("And then they", ("went", "ran off", "slept", "sang"), 3),
]
TEXTS = [torch.arange(32).remainder(96).reshape(2, 16)]


def test_texts_are_tokenised_many_at_once_and_never_all_of_a_large_file():
    """One by one, the tokens of thousands of questions take seconds, before work and again in every round. All at once, the tokenizer
    held 168 bytes of every token of a file, however large."""
    letters, texts = Letters(), 50 * sum(1 + len(question.choices) for question in QUESTIONS)
    batches = question_batches(QUESTIONS * 50, letters, 100)
    assert len(batches) > 1 and letters.calls == math.ceil(texts / TEXTS_AT_ONCE) == 1
    again = Letters()
    many = question_batches(QUESTIONS * 200, again, 100)
    assert again.calls == math.ceil(4 * texts / TEXTS_AT_ONCE) == 3
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(batches[:-1], many, strict=False))
    assert sum(len(batch.gold) for batch in many) == 200 * len(QUESTIONS)
    assert question_batches([], letters, 100) == []


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_padding_and_batching_change_nothing(parent_folder, batch_tokens):
    model = load_model(parent_folder, torch.float32)
    found = answer_questions(model, question_batches(QUESTIONS, Letters(), batch_tokens))
    for question, correct, gold_log_prob in zip(QUESTIONS, found.correct, found.gold_log_prob, strict=True):
        means = []
        for choice in question.choices:
            ids = torch.tensor([[0, *Letters()([f"{question.query} {choice}"])["input_ids"][0]]])
            with torch.no_grad():
                log_probs = F.log_softmax(model(ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
            means.append(log_probs[len(question.query) :].mean())  # the space and the choice
        assert correct == float(torch.stack(means).argmax() == question.gold)
        assert gold_log_prob == pytest.approx(F.log_softmax(torch.stack(means), 0)[question.gold].item(), abs=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 200, 10_000])
def test_a_question_does_not_change_another_ones_rotary_frequencies(batch_tokens):
    """Longrope has other frequencies for batches of more than 32 tokens."""
    model = longrope_model()
    long = Question("What is there in the house at the end of the road", ("a cat", "a small dog"), 1)
    straddling = Question("What is it that we see", ("a cat", "a small dog and more"), 0)
    questions = [QUESTIONS[0], long, QUESTIONS[1], straddling, QUESTIONS[2], long]
    lengths = [[1 + len(f"{q.query} {choice}") for choice in q.choices] for q in questions]
    assert max(lengths[0]) <= 32 < min(lengths[1]) and min(lengths[3]) <= 32 < max(lengths[3])
    alone = [answer_questions(model, question_batches([q], Letters(), 10_000, 128, 32)).gold_log_prob[0] for q in questions]
    found = answer_questions(model, question_batches(questions, Letters(), batch_tokens, 128, 32))
    assert found.gold_log_prob == pytest.approx(alone, abs=1e-5)
    mixed = answer_questions(model, question_batches(questions, Letters(), 10_000, 128))
    assert mixed.gold_log_prob != pytest.approx(alone, abs=1e-3), "it matters"


def test_a_model_of_no_numbers_is_right_of_none():
    batch = QuestionBatch(np.array([[1, 2], [1, 3]]), (1, 1), (2, 2), (2,), (0,))
    assert answers_from_logits(torch.full((2, 2, 5), torch.nan), batch).correct == (0.0,)


def test_a_question_with_a_token_beyond_the_embedding_is_refused(tmp_path):
    path, tokenizer = tmp_path / "q.jsonl", byte_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    path.write_text("".join(json.dumps({"query": f"q{n} <image>", "choices": ["a", "b"], "gold": 0}) + "\n" for n in range(9)))
    config = ScoringConfig(downstream=str(path))
    assert batches_for(tokenizer, config, tiny_config(vocab_size=VOCAB_SIZE + 1), "score")
    with pytest.raises(DataError, match="a question has '<image>', and the parent's embedding of 257 rows none for that token"):
        batches_for(tokenizer, config, tiny_config(vocab_size=VOCAB_SIZE), "score")


def test_a_row_that_is_too_long_loses_its_beginning():
    (batch,) = question_batches([QUESTIONS[1]], Letters(), 100, max_tokens=8)
    assert batch.input_ids.shape == (2, 8) and batch.last == (8, 8)
    assert batch.first == (3, 1)  # " here" is five tokens; " nowhere at all" more than there is room for


def test_every_question_is_in_one_half_and_both_are_used(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [{"query": f"q{n}", "choices": ["a", "b"], "gold": n % 2} for n in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score, test = (read_questions(str(path), half) for half in ("score", "test"))
    assert sorted(q.query for q in score + test) == sorted(row["query"] for row in rows)
    assert 60 < len(score) < 140 and read_questions(str(path), "test", limit=10) == test[:10]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}\n', "gold 2 among 2"),
        ('{"query": "a"}\n', "is no question"),
        ('["a"]\n', "is no question"),
        ('{"query": "a", "choices": "bc", "gold": 1}\n', "choices are 'bc'; write a list of two texts"),
        ('{"query": "a", "choices": ["", "c"], "gold": 1}\n', "none of them empty"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 1.7}\n', "gold is 1.7"),
        ('{"query": "a", "choices": ["b", "c"], "gold": "1"}\n', "gold is '1'; write the number of the right choice"),
        ('{"query": "a\\ud800", "choices": ["b", "c"], "gold": 1}\n', "query is 'a.ud800'; write it as a text"),
        ("\n", "holds no question"),
        (None, "cannot be read"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, said):
    path = tmp_path / "q.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=said):
        read_questions(str(path))


def test_questions_are_read_in_the_tokens_of_a_parent_that_is_a_url(tmp_path, parent_folder):
    folder, path = tmp_path / "parent", tmp_path / "q.jsonl"
    shutil.copytree(parent_folder, folder)
    byte_tokenizer().save_pretrained(folder)
    path.write_text("".join(json.dumps({"query": f"q{n}", "choices": ["a", "b"], "gold": 0}) + "\n" for n in range(20)))
    config = ScoringConfig(downstream=str(path))
    here, there = (
        load_questions(parent, config, tiny_config(vocab_size=VOCAB_SIZE)) for parent in (str(folder), f"file://{folder}")
    )
    assert [batch.input_ids.tolist() for batch in here] == [batch.input_ids.tolist() for batch in there] != []


def test_a_half_without_questions_is_named(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}\n')
    (question,) = read_questions(str(path))
    (half,) = halves([question_digest(question.query, question.choices)], [question.task])
    assert read_questions(str(path), half) == [question]
    other = "test" if half == "score" else "score"
    with pytest.raises(DataError, match=f"holds no question in the half to {other}"):
        read_questions(str(path), other)


@pytest.mark.parametrize("racing", [False, True])
def test_damage_is_what_the_gold_choice_loses_in_the_whole_model(parent_folder, tmp_path, racing):
    config = read_config(parent_folder)
    descriptor, space = describe(config), search_space(config, ("noop",), ("noop",), 8)
    stack = load_stack(parent_folder, descriptor, config, 0, 3, torch.float32)
    batches = question_batches(QUESTIONS, Letters(), 100)
    assert len(batches) > 1

    def states_of(layer, choice):
        return {kind: {} for kind in KINDS if choice.variant(kind) != PARENT}

    step = Store(str(tmp_path)).artifact("scores", {"racing": racing}, {})
    settings = ScoringConfig(granularity="subblock", racing=racing)
    scores = score_serially(stack, TEXTS * 3, space, settings, step, states_of, Quiet(), batches)
    gold = answer_questions(load_model(parent_folder, torch.float32), batches).gold_log_prob
    rows = [row for row in scores.rows if row.metric == "downstream"]
    assert len(rows) == 6 and len(scores.rows) == 6 * 8
    for row in rows:
        choices = [LayerChoice(row.attention, row.ffn) if n == row.layer else LayerChoice() for n in range(3)]
        states = {(row.layer, kind): {} for kind in KINDS if choices[row.layer].variant(kind) != PARENT}
        child = answer_questions(assemble(parent_folder, config, choices, states, torch.float32), batches).gold_log_prob
        assert row.value == mean(tuple(p - c for p, c in zip(gold, child, strict=True)))


def test_a_trained_model_does_better_than_chance(shared_data):
    from transformers import AutoTokenizer

    folder = shared_data / "stories260K"
    questions = read_questions(str(shared_data / "tinystories" / "next_sentence_mc.jsonl"), limit=200)
    batches = question_batches(questions, AutoTokenizer.from_pretrained(folder), 4096, 512)
    found = answer_questions(load_model(folder, torch.float32), batches).summary()
    assert found["questions"] == 200 and found["accuracy"] - 3 * found["accuracy_stderr"] > 0.25
