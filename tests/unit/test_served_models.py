"""Models that a server is given: found, whole, and known to be servable before anything is started."""

import shutil
from pathlib import Path

import pytest
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from small_models import save_parent, tiny_config

from puzzle_ray.errors import ConfigError, ParentError, PuzzleError
from puzzle_ray.models.tokenizer import read_tokenizer
from puzzle_ray.serving.fetch import check_model, check_servable, fetch_model


def test_a_model_that_cannot_be_served_is_known_before_it_is_loaded(tmp_path):
    folder = save_parent(tmp_path / "model", vocab_size=VOCAB_SIZE)
    with pytest.raises(PuzzleError, match="no tokenizer"):
        check_servable(str(folder), 0)
    byte_tokenizer().save_pretrained(folder)
    check_servable(str(folder), 128)
    with pytest.raises(ConfigError, match="max_length: is 129; give 2 to 128"):
        check_servable(str(folder), 129)
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(PuzzleError, match="model.safetensors cannot be read"):
        check_servable(str(cut), 0)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    tiny_config(vocab_size=VOCAB_SIZE, intermediate_size=64).save_pretrained(other)
    with pytest.raises(PuzzleError, match="other shapes than its config.json"):
        check_servable(str(other), 0)


def test_a_model_is_fetched_from_a_path_or_a_url(tmp_path, parent_folder):
    assert fetch_model(check_model(str(parent_folder))) == str(parent_folder)
    url = f"file://{parent_folder}"
    fetched = fetch_model(check_model(url))
    assert fetched != str(parent_folder)
    names = {path.name: path.read_bytes() for path in parent_folder.iterdir()}
    assert {path.name: path.read_bytes() for path in Path(fetched).iterdir()} == names
    for nowhere in [str(tmp_path / "none"), str(tmp_path), f"file://{tmp_path}", "nosuch://x/y"]:
        with pytest.raises(PuzzleError, match="name a|name an"):
            check_model(nowhere)


def test_a_tokenizer_of_sentencepieces_says_what_to_install(tmp_path, monkeypatch):
    """transformers falls back to tiktoken and asks for that, which cannot read such a file."""
    save_parent(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr("puzzle_ray.models.tokenizer.find_spec", lambda name: None)
    with pytest.raises(ParentError, match=r"tokenizer\.model is sentencepiece's.*pip install sentencepiece protobuf"):
        read_tokenizer(tmp_path)
