"""A tokenizer with code of its own: refused before work where it is not trusted, and read by every stage where it is."""

import ast
import json
from pathlib import Path

import pytest
import torch
from small_runs import SMALL, save_parent_with_text

import jobs
from puzzle_ray.errors import ParentError
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.tokenizer import read_tokenizer
from puzzle_ray.pipeline import compress
from puzzle_ray.progress import Quiet

ROOT = Path(jobs.__file__).parents[1]
SERVED = {"puzzle_ray/serving/fetch.py", "actors/child_server.py"}  # never trust
CODE = """from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder, text = save_parent_with_text(tmp_path_factory.mktemp("parent"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | own))
    (folder / "tokenization_own.py").write_text(CODE)
    return folder, text


def test_it_is_refused_where_it_is_not_trusted(parent):
    with pytest.raises(ParentError, match="it asks for code of its own.; set trust_remote_code: true"):
        read_tokenizer(parent[0])
    assert type(read_tokenizer(parent[0], True)).__name__ == "OwnTokenizer"


def test_where_it_is_trusted_all_stages_read_it(parent, tmp_path):
    """Else the last ones refuse it, when all of the training is done."""
    torch.set_num_threads(1)
    question = json.dumps({"query": "a text", "choices": [" of", " some"], "gold": 0}) + "\n"
    (tmp_path / "q.jsonl").write_text("".join(question.replace("a text", f"a text {n}") for n in range(40)))
    scoring = SMALL["scoring"] | {"downstream": str(tmp_path / "q.jsonl")}
    answers = SMALL["gkd"] | {"lm_weight": 1.0, "lm_tokens": {"after": " of", "until": " text"}}
    settings = SMALL | {
        "gkd": answers,
        "scoring": scoring,
        "parent": str(parent[0]),
        "data.train": str(parent[1]),
        "trust_remote_code": True,
    }
    found = compress(settings=settings, store=str(tmp_path / "store"), progress=Quiet())
    assert found.evaluation["models"].keys() >= {"parent", "child"} and found.quality["samples"]


def test_every_reader_of_a_runs_tokenizer_is_told_whether_it_is_trusted():
    without = []
    for path in sorted(p for folder in ("puzzle_ray", "actors", "jobs") for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(getattr(node, "func", None), "id", None)
            if name in ("read_tokenizer", "tokenizer_of") and len(node.args) + len(node.keywords) < 2:
                without.append(path.relative_to(ROOT).as_posix())
    assert set(without) == SERVED


@pytest.mark.parametrize(("trusted", "fetched"), [(False, False), (True, True)])
def test_the_code_of_a_hub_id_is_fetched_where_it_is_trusted(monkeypatch, tmp_path, trusted, fetched):
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **how: asked.update(how) or str(tmp_path))
    assert locate("org/model", "main", trusted) == tmp_path
    assert ("*.py" in asked["allow_patterns"]) == fetched
