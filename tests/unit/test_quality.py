"""What models are asked: answers are those of each request alone; the same bits however often they are asked for; a run is resumed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from serving_models import longrope_model
from small_models import save_parent
from torch.nn import functional as F

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.config import load
from puzzle_ray.data.order import Tokens
from puzzle_ray.errors import ConfigError, DataError
from puzzle_ray.evaluation.quality import Quality, quality_facts
from puzzle_ray.evaluation.reader import AskHere, Reader
from puzzle_ray.evaluation.requests import ANSWERS, Continuations, Likelihoods, Predictions
from puzzle_ray.evaluation.retrieval import (
    ANSWER_TOKENS,
    CHOICES,
    KINDS,
    check_lengths,
    make_questions,
    retrieval_chunks,
    retrieval_scores,
    retrieval_table,
)
from puzzle_ray.evaluation.settings import EvaluateConfig
from puzzle_ray.models.child import load_model, new_child, read_config, save_child
from puzzle_ray.models.tokenizer import read_tokenizer
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Store

CHOICES_OF_CHILD = (LayerChoice("noop", "parent"), LayerChoice("gqa:1", "ffn:24"), LayerChoice("parent", "noop"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A parent with a tokenizer, and a random child of it whose first layer has no attention."""
    parent = save_parent(tmp_path_factory.mktemp("parent"), vocab_size=VOCAB_SIZE)
    byte_tokenizer().save_pretrained(parent)
    child = tmp_path_factory.mktemp("child")
    torch.manual_seed(1)
    save_child(new_child(read_config(parent), CHOICES_OF_CHILD, torch.float32), parent, child)
    return {"parent": str(parent), "child": str(child)}


def alone(model, context, continuation):
    """(log-probability, whether it is the greedy one) of a continuation, by one plain forward."""
    with torch.no_grad():
        log_probs = F.log_softmax(model(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1], -1)
    wanted = torch.tensor(continuation)
    return log_probs.gather(-1, wanted[:, None]).sum().item(), bool((log_probs.argmax(-1) == wanted).all())


@pytest.mark.parametrize("name", ["parent", "child"])
@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
def test_likelihoods_are_those_of_each_pair_alone(folders, name, batch_tokens):
    model = load_model(folders[name], torch.float32)
    with torch.no_grad():
        best = int(model(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
    pairs = [
        ((5, 6, 7), (best,)),
        ((5, 6, 7), (9,)),
        ((5, 6, 7), (9, 10, 11)),
        ((5, 6, 7, 9, 10), (3,)),
        ((1,), (2, 3, 4, 5, 6, 7, 8, 9)),
    ]
    found = Reader(folders[name], batch_tokens).answer(Likelihoods(tuple(pairs)))
    for pair, log_prob, is_greedy in zip(pairs, found["log_prob"], found["is_greedy"], strict=True):
        expected, greedy = alone(model, *pair)
        assert log_prob == pytest.approx(expected, abs=1e-4) and is_greedy == greedy
    assert found["is_greedy"][0] and not found["is_greedy"][1]


def test_what_is_too_long_loses_its_beginning(folders):
    reader = Reader(folders["parent"], 1000)
    context, continuation = tuple(i % 50 for i in range(200)), (3, 4, 5)
    found = reader.answer(Likelihoods(((context, continuation),)))
    expected, _ = alone(reader.model, context[-(129 - 3) :], continuation)  # 128 positions; the last token is not read
    assert found["log_prob"][0] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(DataError, match="a continuation has 129 tokens, and the model 128 positions"):
        reader.answer(Likelihoods((((1,), tuple([2] * 129)),)))


def test_pairs_and_prompts_of_a_model_with_longrope_are_read_as_each_alone(tmp_path):
    model = longrope_model()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(2, 90, 60).tolist()
    pairs = [(tuple(ids[:n]), tuple(ids[n : n + 3])) for n in (5, 28, 29, 31, 50)]
    reader = Reader(str(tmp_path), 10_000)
    found = reader.answer(Likelihoods(tuple(pairs)))
    assert found["log_prob"] == pytest.approx([alone(model, *pair)[0] for pair in pairs], abs=1e-4)
    prompts = (tuple(ids[:4]), tuple(ids[:26]))
    found = reader.answer(Continuations((*prompts, tuple(ids)), 6))
    for prompt, own in zip((*prompts, ids[-26:]), found["ids"], strict=True):  # 26 and 6 are the 32 that it serves
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
        ids_found = own[own >= 0].tolist()
        assert ids_found == expected[0, len(prompt) :].tolist()[: len(ids_found)]


def test_continuations_are_those_of_generate(folders):
    for name, folder in folders.items():
        reader = Reader(folder, 100)
        prompts = [tuple(np.random.default_rng(n).integers(2, 90, 3 + 5 * n).tolist()) for n in range(5)]
        found = reader.answer(Continuations(tuple(prompts), 6))
        for prompt, ids, length in zip(prompts, found["ids"], found["length"], strict=True):
            alone_ids = reader.model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)[
                0, len(prompt) :
            ]
            assert ids[:length].tolist() == alone_ids.tolist() and (ids[length:] == -1).all(), name
        drawn = [reader.answer(Continuations((prompts[0],) * 2, 6, temperature=2.0))["ids"].tolist() for _ in range(2)]
        assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1], "each prompt has a seed of its own"


def test_predictions(folders):
    reader = Reader(folders["child"], 40)
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, (3, 16))
    found = reader.answer(Predictions(ids))
    with torch.no_grad():
        logits = reader.model(torch.from_numpy(ids)).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(ids)[:, 1:].flatten(), reduction="none").reshape(3, 15)
    assert np.allclose(found["loss"], loss, atol=1e-4) and (found["best"] == logits.argmax(-1).numpy()).mean() > 0.99


def quality(folders, **settings):
    rng = np.random.default_rng(0)
    text = Tokens(rng.integers(2, VOCAB_SIZE, (8, 16), dtype=np.int32))
    config = EvaluateConfig(prompt="a text", sample_tokens=4, samples=2, tokens=128, **settings)
    return Quality(folders, text, text.counts(VOCAB_SIZE), config, None, 0)


def test_the_whole_is_the_same_when_it_is_resumed(folders, tmp_path):
    def ask(artifact):
        return AskHere(folders, 512, artifact, Quiet())

    artifact = Store(str(tmp_path)).artifact("quality", {}, {})
    found = quality(folders).run(ask(artifact))
    names = artifact.names(ANSWERS)
    assert len(names) == 2 * 2, "a chunk of text and one of samples for each model"
    again = ask(artifact)
    assert quality(folders).run(again) == found and again.reader is None, "nothing is asked twice"
    artifact.remove(f"{ANSWERS}/{names[0]}")
    assert quality(folders).run(ask(artifact)) == json.loads(json.dumps(found)) == found

    parent, child = (found["by_position"][0]["models"][name] for name in ("parent", "child"))
    assert parent["agreement"] == 1.0 > child["agreement"] == quality_facts(found)["child_agreement"]
    assert found["tasks"] is None and found["retrieval"] == [] and found["by_document_length"] == []
    prompt, *openings = found["samples"]
    assert prompt["prompt"] == "a text" and prompt["text"] == "" and prompt["same_tokens"]["parent"] >= 1
    assert len(openings) == 2 and all(row["text"] for row in openings)


def test_windows_are_longer_than_the_sequences(folders, tmp_path):
    found = quality(folders, window_tokens=64).run(
        AskHere(folders, 512, Store(str(tmp_path)).artifact("quality", {}, {}), Quiet())
    )
    assert [row["bucket"] for row in found["by_position"]] == ["1 to 15", "16 to 31", "32 to 63"]


class Finder:
    """Answers every question by the number that stands behind the name asked for, as long as it looks no more than `reach` tokens back."""

    def __init__(self, tokenizer, reach):
        self.tokenizer, self.reach = tokenizer, reach

    def __call__(self, asked):
        return [self.answer(chunk) for _, chunk in asked]

    def numbers(self, prompt):
        text, seen = (self.tokenizer.decode(ids) for ids in (prompt, prompt[-self.reach :]))
        names = text.rpartition("What ")[2].partition(" for ")[2].partition(" mentioned")[0].split(", ")
        return [seen.partition(f"numbers for {name} is: ")[2][:7] for name in names]

    def answer(self, chunk):
        if isinstance(chunk, Likelihoods):
            log_prob = [
                float(self.numbers(a)[0] in self.tokenizer.decode(b) and self.numbers(a)[0] != "") for a, b in chunk.pairs
            ]
            return {"log_prob": np.asarray(log_prob), "is_greedy": np.zeros(len(log_prob), bool)}
        ids = np.full((len(chunk.prompts), chunk.max_tokens), -1, np.int32)
        said = [self.tokenizer(" and ".join(self.numbers(prompt)))["input_ids"][: chunk.max_tokens] for prompt in chunk.prompts]
        for row, own in zip(ids, said, strict=True):
            row[: len(own)] = own
        return {"ids": ids, "length": np.asarray([len(own) for own in said])}


def test_retrieval_finds_what_a_model_can_reach(folders):
    tokenizer = read_tokenizer(Path(folders["parent"]))
    needles = make_questions(tokenizer, (1024,), 3, 2, seed=5)
    assert needles == make_questions(tokenizer, (1024,), 3, 2, seed=5) != make_questions(tokenizer, (1024,), 3, 2, seed=6)
    assert len(needles) == len(KINDS) * 3 * 2
    for needle in needles:
        text = tokenizer.decode(needle.prompt)
        assert 900 <= len(needle.prompt) + ANSWER_TOKENS * len(needle.expected) <= 1024
        assert all(value in text for value in needle.expected) and len(needle.choices) == CHOICES
        assert tokenizer.decode(needle.choices[0]).strip() == needle.expected[0]
        others = {tokenizer.decode(ids).strip() for ids in needle.choices[1:]}
        assert len(others) == CHOICES - 1 and not others & set(needle.expected)

    def table(reach):
        finder = Finder(tokenizer, reach)
        answers = [finder.answer(chunk) for chunk in retrieval_chunks(needles)]
        rows = retrieval_table(needles, {"parent": retrieval_scores(needles, answers, tokenizer)})
        return {(row["kind"], row["depth"]): row["models"]["parent"] for row in rows}

    far, near = table(10_000), table(400)
    assert far["single", None] == {"recall": 1.0, "choice": 1.0} == far["multi_key", None]
    assert far["multi_query", None]["recall"] == 1.0 and far["multi_value", None]["recall"] == 0.25, "it says one of four"
    assert near["single", 1.0]["recall"] == 1.0 and near["single", 0.0]["recall"] == 0.0


def test_lengths_that_are_too_small_are_told_at_once_with_what_holds_every_kind(folders):
    tokenizer, of_length = read_tokenizer(Path(folders["parent"])), (3, 2, 0)
    with pytest.raises(DataError) as error:
        check_lengths(tokenizer, (500, 4096, 40), *of_length)
    said = str(error.value)
    assert said.startswith("evaluate.retrieval_tokens: 40 and 500 tokens do not hold a question of every kind: single takes ")
    assert [name for name in re.findall(r"(\w+) takes", said)] == [kind.name for kind in KINDS]
    enough = int(re.search(r"ask for at least (\d+) tokens, which hold all kinds", said)[1])
    made = make_questions(tokenizer, (enough,), *of_length)
    assert {needle.kind for needle in made} == {kind.name for kind in KINDS}
    assert all(len(needle.prompt) + ANSWER_TOKENS * len(needle.expected) <= enough for needle in made)
    with pytest.raises(DataError, match=f"{enough - 30} tokens do not hold a question of every kind: multi_query takes"):
        make_questions(tokenizer, (enough - 30,), *of_length)
    with pytest.raises(DataError, match="leave it empty: all kinds take .* tokens, and the parent has 64 positions"):
        check_lengths(tokenizer, (40,), *of_length, positions=64)


def test_a_model_that_tells_no_number_from_another_is_right_of_none(folders):
    """The right one is the first of four: a tie, or NaN, must not choose it."""
    tokenizer = read_tokenizer(Path(folders["parent"]))
    needles = make_questions(tokenizer, (1024,), 1, 1, seed=5)[:1]
    said = {"ids": np.zeros((1, 1), dtype=np.int32), "length": np.zeros(1, dtype=np.int64)}
    for log_prob in (np.full(CHOICES, -3.0), np.full(CHOICES, np.nan)):
        assert retrieval_scores(needles, [{"log_prob": log_prob}, said], tokenizer) == [(0.0, 0.0)]


def test_settings():
    plain = load().quality_identity()
    assert load(overrides=("evaluate.repeats=9", "evaluate.resamples=200", "seed=3")).quality_identity() == plain
    assert load(overrides=("evaluate.samples=1",)).quality_identity() != plain
    tasks = "evaluate.tasks=[some/folder/a.jsonl.gz, mmlu]"
    with_tasks = load(overrides=(tasks,))
    assert with_tasks.asked_half is None and with_tasks.quality_identity()["tasks"] == ["a", "mmlu"]
    assert load(overrides=(tasks, "scoring.downstream=q.jsonl")).asked_half == "test"
    assert load(overrides=(tasks, "scoring.downstream=q.jsonl", "evaluate.half=all")).asked_half is None
    assert load(overrides=(tasks,)).evaluate.identity() == load().evaluate.identity(), "no model is timed again"
    with pytest.raises(ConfigError, match="evaluate.confidence"):
        load(overrides=("evaluate.confidence=1.0",))
