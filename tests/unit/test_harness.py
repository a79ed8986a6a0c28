"""lm-evaluation-harness on children and parents: our numbers are those of its own `hf` model, offline, on every kind of question."""

import json
import os
from pathlib import Path

import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from small_models import save_parent

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.config import load
from puzzle_ray.data.order import Tokens
from puzzle_ray.errors import ConfigError, DataError, ParentError
from puzzle_ray.evaluation.question_files import check_texts
from puzzle_ray.evaluation.settings import EvaluateConfig
from puzzle_ray.models.child import new_child, read_config, save_child
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Store

try:
    import lm_eval
except ImportError:
    lm_eval = None
else:
    from puzzle_ray.evaluation.harness import PuzzleLM, Tasks, check_tasks, write_questions
    from puzzle_ray.evaluation.quality import Quality, quality_facts
    from puzzle_ray.evaluation.reader import AskHere
    from puzzle_ray.scoring.downstream import read_questions

installed = pytest.mark.skipif(lm_eval is None, reason="lm-evaluation-harness (the extra `eval`) is not installed")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    parent = save_parent(tmp_path_factory.mktemp("parent"), vocab_size=VOCAB_SIZE, max_position_embeddings=64)
    byte_tokenizer().save_pretrained(parent)
    child = tmp_path_factory.mktemp("child")
    torch.manual_seed(1)
    choices = (LayerChoice("noop", "parent"), LayerChoice("gqa:1", "ffn:24"), LayerChoice("parent", "noop"))
    save_child(new_child(read_config(parent), choices, torch.float32), parent, child)
    return {"parent": str(parent), "child": str(child)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Questions of each kind, some longer than the parent's positions."""
    folder = tmp_path_factory.mktemp("questions")
    kinds = {
        "ranked": [
            {"query": f"line {n} " * (1 + n % 9), "choices": ["a", "bb", "c" * (1 + n % 5)], "gold": n % 3} for n in range(31)
        ],
        "letters": [{"query": f"question {n} of", "choices": ["A", "B", "C", "D"], "gold": n % 4} for n in range(21)],
        "contexts": [{"context_options": [f"a {n}", f"the {n}"], "continuation": f"end {n}", "gold": n % 2} for n in range(11)],
        "foretold": [{"context": f"and {n} then", "continuation": f"it {n}"} for n in range(11)],
    }
    for name, lines in kinds.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(folder / f"{name}.jsonl") for name in kinds]


def close(own, other):
    assert own.keys() == other.keys()
    for task, of_metrics in other.items():
        assert own[task] == {name: pytest.approx(value, rel=1e-5) for name, value in of_metrics.items()}, task


@installed
@pytest.mark.parametrize("fewshot", [None, 2])
def test_the_numbers_are_those_of_lm_evals_own_hf_model(folders, files, fewshot):
    from lm_eval.models.huggingface import HFLM

    tasks, config = Tasks(files, None, None), EvaluateConfig(num_fewshot=fewshot)
    theirs = tasks.evaluate(HFLM(folders["parent"], device="cpu", dtype="float32", batch_size=4), config, 0)
    ours = tasks.evaluate(PuzzleLM(folders["parent"], batch_tokens=300), config, 0)
    assert ours.values == theirs.values
    close(ours.figures, theirs.figures)
    assert set(ours.figures["foretold"]) == {"acc,none", "perplexity,none"} and len(ours.values["ranked"]["acc_norm,none"]) == 31
    child = tasks.evaluate(PuzzleLM(folders["child"]), config, 0)
    assert child.figures["foretold"]["perplexity,none"] != pytest.approx(ours.figures["foretold"]["perplexity,none"], rel=1e-3)
    assert tasks.chances() == {"ranked": pytest.approx(1 / 3), "letters": 0.25, "contexts": 0.5}


@installed
def test_whole_texts_and_answers_are_those_of_the_hf_model(folders):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    hf, own = HFLM(folders["parent"], device="cpu", dtype="float32", batch_size=4), PuzzleLM(folders["parent"])
    texts = [
        "a short one",
        "a text that is longer than the sixty-four positions of this parent, by a whole window and some more " * 2,
    ]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    assert own.loglikelihood_rolling(rolling) == pytest.approx(hf.loglikelihood_rolling(rolling), rel=1e-5)
    how = {"until": [own.tokenizer.decode([40])], "max_gen_toks": 12}
    asked = [Instance("generate_until", {}, (f"begin {n}", dict(how)), n) for n in range(3)]
    assert own.generate_until(asked) == hf.generate_until(asked)


@installed
def test_the_half_for_tests_is_what_scoring_does_not_read(folders, files, tmp_path):
    ranked, letters = files[:2]
    tested = Tasks([ranked, letters], "test", None)
    assert {name: len(own) for name, own in tested.documents.items()} in [
        {"ranked": r, "letters": n} for r in (15, 16) for n in (10, 11)
    ], "each task is split by itself"
    path = str(tmp_path / "all.jsonl")
    assert write_questions([ranked, letters], path) == 52
    scoring = {(q.task, q.query) for q in read_questions(path, "score")}
    asked = {(name, task.eval_docs[i]["query"]) for name, task in tested.tasks.items() for i in tested.documents[name]}
    assert not scoring & asked and len(scoring) + len(asked) == 52
    answers = tested.evaluate(PuzzleLM(folders["parent"]), EvaluateConfig(), 0)
    whole = Tasks([ranked], None, None).evaluate(PuzzleLM(folders["parent"]), EvaluateConfig(), 0)
    expected = [whole.values["ranked"]["acc,none"][i] for i in tested.documents["ranked"]]
    assert answers.values["ranked"]["acc,none"] == expected
    assert len(Tasks([ranked], "test", 4).documents["ranked"]) == 4
    with pytest.raises(ConfigError, match="task 'contexts' ranks no choices behind a question"):
        write_questions([files[2]], path)


@installed
def test_parent_and_child_are_compared_on_tasks(folders, files, tmp_path):
    text = Tokens(torch.randint(2, VOCAB_SIZE, (4, 16), dtype=torch.int32).numpy())
    config = EvaluateConfig(tokens=64, tasks=tuple(files), resamples=300, samples=0, sample_tokens=2)
    artifact = Store(str(tmp_path)).artifact("quality", {}, {})
    ask = AskHere(folders, 512, artifact, Quiet())
    found = Quality(folders, text, text.counts(VOCAB_SIZE), config, None, 0).run(ask)
    tasks = json.loads(json.dumps(found))["tasks"]
    assert [row["entry"] for row in tasks["entries"]] == ["ranked", "letters", "contexts", "foretold"]
    kept = {row["entry"]: row["models"]["child"] for row in [*tasks["entries"], tasks["mean"] | {"entry": "mean"}]}
    alone = Tasks(files, None, None).evaluate(PuzzleLM(folders["child"]), config, 0)
    for entry in ("ranked", "letters"):
        assert kept[entry]["child"]["value"] == pytest.approx(alone.figures[entry]["acc_norm,none"])
        assert kept[entry]["chance"] == pytest.approx({"ranked": 1 / 3, "letters": 0.25}[entry])
    assert quality_facts(found)["child_retained"] == kept["mean"]["retained"]
    assert tasks["lm_eval"] == lm_eval.__version__ or tasks["lm_eval"]


@installed
@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("{}\n", "has lines of "),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}\n', "gold 2 among 2 choices"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}\n', "gold is True"),
        ('{"query": "a", "choices": ["", "c"], "gold": 0}\n', r":1: choices are \['', 'c'\]; write a list of two texts"),
        ('{"query": "a", "choices": "bc", "gold": 0}\n', ":1: choices are 'bc'; write a list of two texts"),
        ('{"query": "a", "choices": ["b"], "gold": 0}\n', "write a list of two texts or more"),
        ('{"query": "a", "choices": {"text": ["b", "c"]}, "gold": 0}\n', "write a list of two texts or more"),
        ('{"query": ["a"], "choices": ["b", "c"], "gold": 0}\n', r"query is \['a'\]; write it as a text"),
        ('{"context": "a", "continuation": null}\n', "continuation is None; write it as a text"),
        ('{"context": "a", "continuation": "b"}\n{"context": "a"}\n', ":2 has other fields than the first line"),
        ('[{"query": "a", "choices": ["b", "c"], "gold": 0}]\n', "q.jsonl:1 is no question"),
        ('{"query": "a\\ud800", "choices": ["b", "c"], "gold": 0}\n', "query is 'a.ud800'; write it as a text"),
        ('{"query": "a", "choices": ["b", "c\\udfff"], "gold": 0}\n', "write a list of two texts or more"),
        ('{"context": "a", "continuation": ""}\n', "continuation is empty"),
        ("\n", "holds no question"),
    ],
)
def test_what_is_no_question_is_said_before_work(tmp_path, lines, words):
    path = tmp_path / "q.jsonl"
    path.write_text(lines)
    with pytest.raises(DataError, match=words):
        check_tasks([str(path)])


@installed
def test_a_tokenizer_without_a_token_for_beginning_or_end_asks_what_has_a_context(tmp_path):
    parent = save_parent(tmp_path / "parent", vocab_size=VOCAB_SIZE)
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(parent)
    model = PuzzleLM(str(parent))
    assert model.tok_encode("ab") == byte_tokenizer().encode("ab")
    with pytest.raises(ParentError, match="an empty context is asked, .*; name eos_token"):
        _ = model.prefix_token_id


@installed
def test_a_context_of_spaces_is_read_like_an_empty_one(folders, tmp_path):
    """lm_eval moves the spaces at a context's end to what is foretold, and so leaves the context empty."""
    path, choices = tmp_path / "q.jsonl", ["b", "cc"]
    path.write_text("".join(json.dumps({"query": q, "choices": choices, "gold": 0}) + "\n" for q in ("  ", "")))
    lm = PuzzleLM(folders["parent"])
    lm.tokenizer.bos_token = None
    asked = []
    lm.ask = lambda chunks, ask=lm.ask: (asked.extend(chunks), ask(chunks))[1]
    Tasks([str(path)], None, None).evaluate(lm, EvaluateConfig(), 0)
    assert {context for chunk in asked for context, _ in chunk.pairs} == {(lm.eot_token_id,)}
    with pytest.raises(DataError, match="'x' has no token of its own to be foretold"):
        lm._loglikelihood_tokens([(("a", "x"), [1], [])])


def test_questions_in_the_parents_tokens_are_looked_at_before_work(folders, tmp_path):
    path, tokenizer, config = tmp_path / "q.jsonl", byte_tokenizer(), read_config(Path(folders["parent"]))
    path.write_text(json.dumps({"query": "a " * 200, "choices": ["b" * 60, "c"], "gold": 0}) + "\n")
    check_texts([str(path)], tokenizer, config)
    path.write_text(json.dumps({"query": "a", "choices": ["b" * 90, "c"], "gold": 0}) + "\n")
    with pytest.raises(DataError, match="question 1 of .*91 tokens to foretell, and the parent 64 positions"):
        check_texts([str(path)], tokenizer, config)
    lines = [{"query": "a", "choices": [long, "c"], "gold": 0} for long in ("b", "b" * 90)]
    path.write_text("\n".join(map(json.dumps, lines)))
    check_texts([str(path)], tokenizer, config, limit=1)
    with pytest.raises(DataError, match="question 2 of"):
        check_texts([str(path)], tokenizer, config, limit=2)
    path.write_text('{"question": "a", "options": ["b", "c"], "answer": 0}\n')
    with pytest.raises(DataError, match="there is no file '.*none.jsonl'; name one .jsonl file of questions"):
        check_texts([str(tmp_path / "none.jsonl")], tokenizer, config)
    with pytest.raises(DataError, match="has lines of answer, options, question; write query, choices, gold; or context_opt"):
        check_texts([str(path)], tokenizer, config)
    tokenizer.add_tokens("<new>")
    path.write_text(json.dumps({"query": "a <new>", "choices": ["b", "c"], "gold": 0}) + "\n")
    with pytest.raises(DataError, match="question 1 of .*'<new>', and the parent's embedding of"):
        check_texts([str(path)], tokenizer, config)


@installed
def test_fields_of_ones_own_beside_a_question_may_hold_anything(tmp_path):
    path = tmp_path / "q.jsonl"
    question = {"query": "a", "choices": ["b", "c"], "gold": 0}
    path.write_text("".join(json.dumps(question | {"source": source}) + "\n" for source in ("web", 3, [1, "a"], None)))
    check_tasks([str(path)])


@installed
def test_an_entry_that_is_named_twice_is_said_before_work(tmp_path):
    """The names of files are those of entries: folders are no part of them."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "q.jsonl").write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}\n')
    with pytest.raises(ConfigError, match="b/q.jsonl' has a task that is there already; name every task once, and call files"):
        check_tasks([str(tmp_path / folder / "q.jsonl") for folder in ("a", "b")])


@installed
def test_an_unknown_task_is_named_with_its_like():
    with pytest.raises(ConfigError, match="lm_eval has no task 'arc_esay'.*arc_easy"):
        check_tasks(["arc_esay"])


@installed
def test_the_questions_that_lie_beside_the_project(shared_data):
    """On a trained parent, offline: ours and lm_eval's `hf` answer every question alike."""
    from lm_eval.models.huggingface import HFLM

    parent, names = str(shared_data / "stories260K"), ("arc_easy", "copa", "lambada_openai", "piqa", "winogrande")
    files = [str(shared_data / "multiple_choice" / f"{name}.jsonl") for name in names]
    tasks = Tasks([*files, str(shared_data / "tinystories" / "next_sentence_mc.jsonl")], None, 25)
    ours = tasks.evaluate(PuzzleLM(parent), EvaluateConfig(), 0)
    theirs = tasks.evaluate(HFLM(parent, device="cpu", dtype="float32", batch_size=16), EvaluateConfig(), 0)
    assert ours.values == theirs.values
    close(ours.figures, theirs.figures)


@pytest.mark.skipif(lm_eval is not None, reason="lm-evaluation-harness is installed")
def test_tasks_without_lm_eval_are_refused_by_the_name_of_the_extra(tmp_path):
    from puzzle_ray.evaluation.task_names import task_sources

    config = load(overrides=(f"evaluate.tasks=[{tmp_path}/a.jsonl]",))
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ConfigError, match="evaluate.tasks: lm-evaluation-harness is not installed; install the extra `eval`"):
        task_sources(config.evaluate.tasks)
    assert task_sources(()) == {} and os.environ["HF_HUB_OFFLINE"] == "1"
