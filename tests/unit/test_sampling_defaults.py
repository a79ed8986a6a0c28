"""What a checkpoint's generation_config.json says holds for what a request leaves out, in the parent's server and the child's."""

import asyncio
import json

import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from serving_models import TOKENIZER, tiny_model
from small_models import save_parent

from jobs.serve_child import check_child, tell_defaults
from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.errors import ConfigError, ParentError
from puzzle_ray.export.deci_checkpoint import export_nemotron_nas
from puzzle_ray.models.child import new_child, read_config, save_child
from puzzle_ray.serving.engine import Engine
from puzzle_ray.serving.fetch import read_sampling_defaults
from puzzle_ray.serving.openai_api import OpenAIService, ServedModel
from puzzle_ray.serving.requests import ChatRequest, CompletionRequest
from puzzle_ray.serving.sampling_defaults import SamplingDefaults, sampling_defaults

QWENS = {
    "do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": [0, 3],
    "max_new_tokens": 40,
}  # fmt: skip
VALUES = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
MESSAGES = [{"role": "user", "content": "hello"}]


def written(folder, name, said):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(said if isinstance(said, str) else json.dumps(said))
    return str(folder)


def test_what_a_request_leaves_out_is_the_models_and_what_it_gives_is_its_own():
    defaults = sampling_defaults(QWENS, "file")

    def of(request):
        (params,) = request.sampling_params(defaults)
        return params

    params = of(CompletionRequest(prompt="x", top_p=None))
    assert {name: getattr(params, name) for name in VALUES} == VALUES
    assert (params.max_tokens, params.min_p) == (16, 0)  # completions have OpenAI's limit, as in vLLM
    params = of(CompletionRequest(prompt="x", temperature=0, top_k=-1, top_p=1, repetition_penalty=1, max_tokens=3))
    assert (params.temperature, params.top_k, params.top_p, params.repetition_penalty, params.max_tokens) == (0, 0, 1, 1, 3)
    chat = ChatRequest(messages=MESSAGES)
    assert of(chat).max_tokens == 40 and chat.within(of(chat), 7).max_tokens == 7  # never refused for lack of room
    assert of(ChatRequest(messages=MESSAGES, max_completion_tokens=50)).max_tokens == 50
    (params,) = chat.sampling_params()
    assert (params.temperature, params.max_tokens) == (1, None)
    assert len(CompletionRequest(prompt="x", n=3).sampling_params(defaults)) == 3


@pytest.mark.parametrize(
    ("said", "values", "max_tokens", "unused"),
    [({}, {}, None, ()), (QWENS, VALUES, 40, ()), ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.6}, None, ()),
     ({"top_k": -1, "min_p": 0.1, "presence_penalty": 1.5}, {"top_k": 0, "min_p": 0.1, "presence_penalty": 1.5}, None, ()),
     ({"temperature": None, "no_repeat_ngram_size": 3, "typical_p": 1.0, "top_h": 0.4}, {}, None, ("no_repeat_ngram_size", "top_h"))],
)  # fmt: skip
def test_a_file_is_read_as_vllm_reads_it(said, values, max_tokens, unused):
    found = sampling_defaults(said, "file")
    assert (dict(found.values), found.max_tokens, found.unused) == (values, max_tokens, unused)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("temperature", "hot"), ("temperature", True), ("top_p", 0), ("top_k", 2.5), ("top_k", -2), ("min_p", 2),
     ("repetition_penalty", float("nan")), ("temperature", 10**400), ("max_new_tokens", 0), ("presence_penalty", 9)],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name_before_anything_starts(tmp_path, name, value):
    model = written(tmp_path, "generation_config.json", {name: value})
    with pytest.raises(ConfigError, match=rf"^generation_config\.{name}: is .*{tmp_path}/generation_config.json; .*none$"):
        read_sampling_defaults(model)


def test_the_file_is_found_in_folders_and_behind_urls(tmp_path):
    config = written(tmp_path / "old", "config.json", {"model_type": "llama", "temperature": 0.6})
    assert read_sampling_defaults(config).values == {"temperature": 0.6}  # saved by an old transformers
    for url in ("", "file://"):
        assert read_sampling_defaults(url + written(tmp_path / "old", "generation_config.json", QWENS)).values == VALUES
    assert read_sampling_defaults(str(tmp_path)) == SamplingDefaults()
    for wrong in ("{", "[1]"):
        with pytest.raises(ParentError, match="generation_config.json .*fetch it again"):
            read_sampling_defaults(written(tmp_path / "old", "generation_config.json", wrong))


def test_a_child_has_its_parents_sampling_in_every_format(tmp_path):
    parent = save_parent(tmp_path / "parent", vocab_size=VOCAB_SIZE, num_hidden_layers=2, intermediate_size=768, hidden_size=64)
    byte_tokenizer().save_pretrained(parent)
    written(parent, "generation_config.json", QWENS | {"no_repeat_ngram_size": 3})
    config = read_config(parent)
    child = new_child(config, [LayerChoice("gqa:1", "parent"), LayerChoice("parent", "noop")], torch.float32)
    save_child(child, parent, tmp_path / "child")
    export_nemotron_nas(tmp_path / "child", tmp_path / "nas", ("vllm",))
    own = read_sampling_defaults(str(parent))
    assert own.values == VALUES and own == read_sampling_defaults(str(tmp_path / "child"))
    assert own == read_sampling_defaults(str(tmp_path / "nas"))


def test_the_start_says_what_the_models_own_sampling_is(tmp_path, capsys):
    folder = save_parent(tmp_path / "parent", vocab_size=VOCAB_SIZE)
    byte_tokenizer().save_pretrained(folder)
    models = {"plain": check_child(str(folder), 0)}
    capsys.readouterr()
    tell_defaults(models)
    assert capsys.readouterr() == ("", "")
    written(folder, "generation_config.json", QWENS | {"no_repeat_ngram_size": 3})
    tell_defaults(models)
    out, err = capsys.readouterr()
    said, warned = err.splitlines()
    assert out == ""  # whose first line says that requests are answered
    words = "temperature 0.7, top_p 0.8, repetition_penalty 1.05, top_k 20, max_tokens 40 in chat (its own;"
    assert said.startswith(f"plain: requests that leave it out get {words}")
    assert "no_repeat_ngram_size" in warned


def test_a_greedy_request_gets_the_tokens_of_generate_with_the_models_own_config():
    """`generate` repeats less where generation_config.json says so, greedy or not."""
    model, prompt = tiny_model("child"), list(b"some text")
    model.generation_config.repetition_penalty = 1.7
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), repetition_penalty=1.0, **settings)[0, len(prompt) :]
    assert expected != plain.tolist()
    with Engine(model, TOKENIZER) as engine:
        served = ServedModel("tiny", engine, TOKENIZER, sampling_defaults({"repetition_penalty": 1.7}, "file"))
        service = OpenAIService([served])
        (generation,) = asyncio.run(service.submit(CompletionRequest(prompt=prompt, temperature=0, max_tokens=20)))
        assert generation.result(60).token_ids == expected
        assert service.models()["data"][0]["sampling_defaults"] == {"repetition_penalty": 1.7}
