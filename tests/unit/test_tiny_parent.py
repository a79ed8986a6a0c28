"""The tiny parent: it learns, it loads as any Hugging Face folder, and the same spec gives the same folder."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from puzzle_ray.errors import DataError, StoreError
from puzzle_ray.progress import Quiet
from puzzle_ray.recipes.stories import COLOURS, HE, NUMBERS, SHE, THINGS, person, stories
from puzzle_ray.recipes.tiny_parent import (
    BOS_ID,
    CHECKPOINT,
    EOS_ID,
    TinyParentSpec,
    TinyParentSummary,
    build_tiny_parent,
    make_tiny_parent,
    read_stories,
    source_fingerprint,
    train_tokenizer,
    unigram_entropy,
)
from puzzle_ray.store import Store

SMALL = TinyParentSpec(
    num_stories=500,
    vocab_size=384,
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=128,
    sequence_length=32,
    batch_size=8,
    steps=60,
    warmup_steps=5,
    learning_rate=1e-2,
    heldout_windows=64,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TinyParentSummary]:
    folder = tmp_path_factory.mktemp("tiny_parent")
    return folder, build_tiny_parent(folder, SMALL)


def read_jsonl(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_it_learns(built: tuple[Path, TinyParentSummary]) -> None:
    _, summary = built
    assert summary.losses[-1][0] == SMALL.steps
    assert summary.losses[-1][1] < summary.losses[0][1]
    assert summary.heldout_loss < summary.unigram_entropy
    assert summary.train_tokens == SMALL.steps * SMALL.batch_size * SMALL.sequence_length


def test_the_folder_is_an_ordinary_hugging_face_model(built: tuple[Path, TinyParentSummary]) -> None:
    folder, summary = built
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == summary.num_parameters
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (BOS_ID, EOS_ID)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS_ID, EOS_ID)
    assert len(tokenizer) == model.config.vocab_size == SMALL.vocab_size
    prompt = tokenizer("def ", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape == (1, prompt.input_ids.shape[1] + 4)


def test_heldout_loss_is_that_of_the_saved_model(built: tuple[Path, TinyParentSummary]) -> None:
    """The summary's figure comes out again from the files alone, by Hugging Face's own loss."""
    folder, summary = built
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids: list[int] = []
    for text in read_jsonl(folder / "heldout.jsonl"):
        ids += [BOS_ID, *tokenizer(text).input_ids, EOS_ID]
    windows = torch.tensor(ids).unfold(0, SMALL.sequence_length + 1, SMALL.sequence_length)
    count = min(SMALL.heldout_windows, len(windows))
    windows = windows[torch.arange(count) * len(windows) // count]
    with torch.no_grad():
        loss = model(windows, labels=windows).loss.item()
    assert loss == pytest.approx(summary.heldout_loss, abs=1e-4)


def test_summary_file_holds_what_was_returned(built: tuple[Path, TinyParentSummary]) -> None:
    folder, summary = built
    record = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    record["losses"] = tuple((step, loss) for step, loss in record["losses"])
    assert TinyParentSummary(**record) == summary


@pytest.fixture(scope="module")
def small_tokenizer(built: tuple[Path, TinyParentSummary]) -> object:
    return AutoTokenizer.from_pretrained(built[0] / "model")


@settings(deadline=None, max_examples=100)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(small_tokenizer: object, text: str) -> None:
    ids = small_tokenizer(text).input_ids  # type: ignore[operator]
    assert small_tokenizer.decode(ids) == text  # type: ignore[attr-defined]


def test_tokenizer_learns_merges_up_to_its_vocabulary() -> None:
    text = "def forward(self, hidden_states): return self.down_proj(hidden_states)\n" * 20
    bytes_only, merged = train_tokenizer([text], 258), train_tokenizer([text], 300)
    assert len(bytes_only(text).input_ids) == len(text.encode())
    assert len(merged(text).input_ids) < len(bytes_only(text).input_ids)


def test_held_out_are_stories_that_were_not_learnt(built: tuple[Path, TinyParentSummary]) -> None:
    train, heldout = read_stories(SMALL)
    assert train + heldout == stories(SMALL.num_stories, SMALL.seed) and len(heldout) == SMALL.heldout_share * SMALL.num_stories
    assert not set(train) & set(heldout)
    folder, _ = built
    assert read_jsonl(folder / "train.jsonl") == train
    assert read_jsonl(folder / "heldout.jsonl") == heldout


def test_stories_are_the_same_everywhere() -> None:
    """Drawn by `random.random` alone, which Python promises to keep; the first story is known, so that a drift would be seen."""
    assert stories(20, seed=0) == stories(30, seed=0)[:20]
    assert stories(20, seed=0) != stories(20, seed=1)
    assert hashlib.sha256("\n".join(stories(200)).encode()).hexdigest()[:12] == "d7289d023473"


def test_stories_keep_to_their_facts() -> None:
    """What is lost is found again in its colour, what is given away is missing at the end, and no slot stays open."""
    lost = shared = 0
    for story in stories(400):
        assert not re.search(r"[{}]| a [aeio]| an [^aeio]|  ", story), story
        facts = person(min((name for name in SHE + HE if name in story), key=story.index))
        if "there it was!" in story or "And really" in story:
            lost += 1
            assert [(c, t) for c in COLOURS for t in THINGS if f"{c} {t}" in story] == [(facts["colour"], facts["thing"])], story
        given = re.search(r"I gave (\w+) to the \w+ and one to (\w+)", story)
        if given:
            shared += 1
            had = re.search(r"Where are the (\w+) ", story)
            left = NUMBERS.index(had[1]) - NUMBERS.index(given[1])
            assert f" {NUMBERS[left]} " in story and f" {NUMBERS[left - 1]} " in story and given[2] == facts["friend"], story
    assert lost > 20 and shared > 10


def test_same_spec_twice_gives_identical_weights(tmp_path: Path) -> None:
    spec = replace(SMALL, steps=8, warmup_steps=2)
    folders = [tmp_path / name for name in ("first", "second", "other_seed")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        folder.mkdir()
        build_tiny_parent(folder, replace(spec, seed=seed))
    first, second, other = (load_file(folder / "model" / "model.safetensors") for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


class StoppedAt(Quiet):
    """Progress that interrupts the training at its n-th step, and counts those that were there when it began."""

    def __init__(self, steps: int | None = None) -> None:
        self.stop_at, self.steps, self.found = steps, 0, None

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager:
        return nullcontext(self) if unit == "steps" else super().stage(name, total, unit)

    def advance(self, count: int = 1, **facts: float) -> None:
        self.found = count if self.found is None else self.found
        self.steps += count
        if self.steps == self.stop_at:
            raise KeyboardInterrupt


def test_a_training_that_was_broken_off_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, the second time before anything new was saved."""
    monkeypatch.setattr("puzzle_ray.recipes.tiny_parent.CHECKPOINT_EVERY", 4)
    spec, store = replace(SMALL, steps=15, warmup_steps=2), Store(str(tmp_path / "store"))
    undisturbed, resumed = store.artifact("undisturbed", {}, {}), store.artifact("resumed", {}, {})
    make_tiny_parent(undisturbed, spec, Quiet())
    for stop_at in (10, 9):
        with pytest.raises(KeyboardInterrupt):
            make_tiny_parent(resumed, spec, StoppedAt(stop_at))
        assert resumed.names() == [CHECKPOINT] and not resumed.finished
    last = StoppedAt()
    make_tiny_parent(resumed, spec, last)
    assert last.found == 8 and last.steps == 15
    assert resumed.finished and resumed.names() == undisturbed.names() == ["artifact.json", "parent"]
    one, other = (load_file(a.local_folder("parent") / "model" / "model.safetensors") for a in (undisturbed, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for name in ("losses", "heldout_loss"):
        assert resumed.facts()[name] == undisturbed.facts()[name]


def test_building_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    build_tiny_parent(tmp_path, replace(SMALL, steps=2, warmup_steps=1))
    assert torch.equal(torch.rand(3), expected)


def test_fingerprint_follows_the_spec() -> None:
    assert source_fingerprint(SMALL) == source_fingerprint(replace(SMALL))
    assert source_fingerprint(SMALL) != source_fingerprint(replace(SMALL, seed=1))
    assert source_fingerprint(SMALL) != source_fingerprint(replace(SMALL, num_stories=400))


def test_unigram_entropy_of_a_known_distribution() -> None:
    """Counts 3 and 1 plus one each: p = 4/6 and 2/6."""
    entropy = unigram_entropy(torch.tensor([[0, 1]]), torch.tensor([0, 0, 0, 1]), vocab_size=2)
    assert entropy == pytest.approx(-(torch.tensor([4 / 6, 2 / 6]).log().mean().item()))


def test_default_spec_is_a_parent_of_the_promised_size() -> None:
    spec = TinyParentSpec()
    head_size = spec.hidden_size // spec.num_attention_heads
    attention = 2 * spec.hidden_size * (spec.hidden_size + spec.num_key_value_heads * head_size)
    ffn = 3 * spec.hidden_size * spec.intermediate_size
    total = spec.vocab_size * spec.hidden_size + spec.num_hidden_layers * (attention + ffn)
    assert 2e6 < total < 4e6
    assert spec.num_hidden_layers == 8
    assert 4 <= spec.num_key_value_heads < spec.num_attention_heads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 must be positive"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"heldout_share": 1.0}, "heldout_share=1.0 must lie between 0 and 1"),
        ({"vocab_size": 256}, "vocab_size=256 must be at least 258"),
        ({"hidden_size": 36}, "hidden_size=36 must be a multiple of 2"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads=3"),
        ({"sequence_length": 256}, "sequence_length=256 must not exceed"),
        ({"warmup_steps": 60}, "warmup_steps=60 must be below steps=60"),
    ],
)
def test_a_spec_that_cannot_work_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(StoreError, match="is not an empty folder"):
        build_tiny_parent(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="raise num_stories"):
        build_tiny_parent(
            tmp_path, replace(SMALL, num_stories=2, sequence_length=1024, max_position_embeddings=1024, hidden_size=8)
        )
