"""A whole nemotron_nas checkpoint: the child's own logits, every engine's rules, and what is refused instead."""

import json

import pytest
import torch
from small_models import save_parent

from jobs.app import run
from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.config import validated
from puzzle_ray.errors import ConfigError, ParentError
from puzzle_ray.export import deci_checkpoint
from puzzle_ray.export.deci_checkpoint import export_nemotron_nas
from puzzle_ray.export.engine_rules import ENGINES, problems
from puzzle_ray.export.folders import export_to
from puzzle_ray.export.target import configured_space
from puzzle_ray.models.checkpoint import Checkpoint
from puzzle_ray.models.child import load_model, new_child, read_config, save_child

IDS = torch.arange(24).reshape(1, 24)
SHAPES = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 768}
CHOICES = (LayerChoice("gqa:2", "ffn:256"), LayerChoice("noop"), LayerChoice("gqa_prune:1", "noop"))
LINEAR = (LayerChoice("noop", "linear"), LayerChoice("linear", "ffn:512"), LayerChoice())


def saved(folder, model_type="llama", choices=CHOICES, **changes):
    more = {"word_embed_proj_dim": 64} if model_type == "opt" else {}
    parent = save_parent(folder / "parent", model_type, **(SHAPES | more | changes))
    torch.manual_seed(1)
    child = new_child(read_config(parent), choices, torch.float32).eval()
    save_child(child, parent, folder / "child")
    return child, folder / "child"


def written(folder):
    shapes = {name: shape for name, (_, shape) in Checkpoint(folder).headers.items()}
    return json.loads((folder / "config.json").read_text()), shapes


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "phi3"])
@torch.no_grad()
def test_it_has_the_childs_logits(model_type, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(deci_checkpoint, "SHARD_BYTES", 60_000)
    child, folder = saved(tmp_path, model_type, CHOICES if model_type == "mistral" else LINEAR)
    export_nemotron_nas(folder, tmp_path / "out", ["transformers"])
    assert (tmp_path / "out/model.safetensors.index.json").exists()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(model.eval()(IDS).logits, child(IDS).logits, rtol=1e-5, atol=1e-5)
    ids = IDS[:, :6]
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(tokens, child.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert written(tmp_path / "again")[0]["block_configs"] == written(tmp_path / "out")[0]["block_configs"]


def test_every_engines_rules_hold_for_a_plain_child(tmp_path):
    _, folder = saved(tmp_path, tie_word_embeddings=False)
    export_nemotron_nas(folder, tmp_path / "out", list(ENGINES))
    config, shapes = written(tmp_path / "out")
    for engine in ENGINES:
        assert problems(engine, config, shapes) == []
    broken = {**shapes, "model.layers.0.mlp.up_proj.weight": (257, 64)}
    assert "model.layers.0.mlp.up_proj.weight is [257, 64], and the engine builds [256, 64]" in problems("vllm", config, broken)
    assert problems("vllm", config, {k: v for k, v in shapes.items() if k != "model.norm.weight"}) == [
        "there is no model.norm.weight"
    ]
    blocks = [{"attention": block["attention"]} for block in config["block_configs"]]
    assert problems("llama_cpp", config | {"block_configs": blocks}, shapes) == [
        "layer 0 has attention where attention and ffn belong"
    ]
    whole = [block | {"ffn": block["ffn"] | {"ffn_mult": 6}} for block in config["block_configs"]]
    assert problems("llama_cpp", config | {"block_configs": whole}, shapes)[0].endswith("asserts a JSON float; write 6.0")


@pytest.mark.parametrize(
    ("engine", "choices", "changes", "words"),
    [
        ("vllm", LINEAR, {}, "layer 0 has no attention, and vLLM's DeciLM begins with one; set search.target_format"),
        ("vllm", (*CHOICES[:2], LayerChoice(ffn="linear")), {}, "layer 2 has a linear ffn, which vLLM's DeciLM lacks"),
        ("tensorrt_llm", CHOICES, {"model_type": "qwen2"}, "TensorRT-LLM's DeciLM builds every projection without a bias"),
        ("tensorrt_llm_legacy", CHOICES, {}, "older converter reads lm_head.weight; export with --untie"),
        ("llama_cpp", (*CHOICES[:2], LayerChoice(ffn="linear")), {}, "layer 2 has a linear ffn, which llama.cpp lacks"),
        ("transformers", LINEAR, {"mlp_bias": True}, "mlp.linear_mlp.bias has no place"),
        ("sglang", CHOICES, {}, "unknown engine 'sglang'"),
    ],
)
def test_what_an_engine_could_not_run_is_refused_by_name(engine, choices, changes, words, tmp_path):
    _, folder = saved(tmp_path, changes.pop("model_type", "llama"), choices, **changes)
    with pytest.raises(ConfigError, match=words):
        export_nemotron_nas(folder, tmp_path / "out", [engine])
    assert not (tmp_path / "out").exists()


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_neo"])
def test_a_family_whose_tensors_have_other_names_is_refused_by_name(model_type, tmp_path):
    _, child = saved(tmp_path, model_type, choices=(LayerChoice("noop"), LayerChoice(), LayerChoice()))
    with pytest.raises(ParentError, match=f"{model_type} is not one of llama"):
        export_to(str(child), tmp_path / "exported", "nemotron_nas", ("vllm",))


def test_a_tied_head_can_be_written_as_a_matrix_of_its_own(tmp_path):
    from transformers import AutoModelForCausalLM

    child, folder = saved(tmp_path)
    export_nemotron_nas(folder, tmp_path / "out", ["tensorrt_llm_legacy"], untie=True)
    config, shapes = written(tmp_path / "out")
    assert config["tie_word_embeddings"] is False and shapes["lm_head.weight"] == (96, 64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert torch.equal(model(IDS).logits, child(IDS).logits)


def test_the_verb_writes_both_formats_and_says_in_one_line_what_is_wrong(tmp_path, capsys):
    child, folder = saved(tmp_path)
    assert run(["export-child", "--child", str(folder), "--out", str(tmp_path / "deci")]) == 0
    assert written(tmp_path / "deci")[0]["model_type"] == "nemotron-nas"
    assert run(["export-child", "--child", str(folder), "--format", "native", "--out", str(tmp_path / "native")]) == 0
    assert torch.equal(load_model(tmp_path / "native")(IDS).logits, child(IDS).logits)
    capsys.readouterr()
    assert run(["export-child", "--child", str(folder), "--out", str(tmp_path / "deci")]) == 2
    assert "is there already; name a folder that is empty or absent" in capsys.readouterr().err
    assert run(["export-child", "--child", str(tmp_path / "parent"), "--out", str(tmp_path / "x")]) == 2
    assert "is no child of this package" in capsys.readouterr().err
    for format_ in ("native", "nemotron_nas"):
        inside_a_file = str(folder / "config.json" / "x")
        assert run(["export-child", "--child", str(folder), "--format", format_, "--out", inside_a_file]) == 2
        assert "config.json is no folder; name another folder" in capsys.readouterr().err
        assert run(["export-child", "--child", str(folder), "--format", format_, "--out", "s3://bucket/x"]) == 2
        assert "'s3://bucket/x' is a URL" in capsys.readouterr().err


@pytest.mark.parametrize("format_", ["native", "nemotron_nas"])
def test_a_child_that_is_trained_from_its_beginning_has_weights_to_begin_with(format_, tmp_path):
    """`from_config` builds every layer. What its own shape has made anew is drawn as the family draws it, all else stays."""
    from transformers import AutoConfig, AutoModelForCausalLM

    _, folder = saved(tmp_path, initializer_range=0.3)
    export_to(str(folder), tmp_path / "out", format_, ["transformers"])
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    first, second = [], []
    for found in (first, second):
        torch.manual_seed(3)
        found.append(AutoModelForCausalLM.from_config(config, trust_remote_code=True))
        found.append(torch.rand(1))
    states = [dict(found[0].state_dict()) for found in (first, second)]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
        if value.dim() == 2:
            assert float(value.std()) == pytest.approx(0.3, rel=0.1), name
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(read_config(tmp_path / "parent"))
    if format_ == "native":
        assert torch.equal(torch.rand(1), first[1])


def test_the_search_can_be_kept_within_the_format(tmp_path):
    config = read_config(save_parent(tmp_path / "parent", **SHAPES))
    words = {
        "attention": ["parent", "gqa:2", "window:16", "linear", "noop"],
        "ffn": ["parent", "ffn:50%", "ffn:10%", "linear", "noop"],
    }
    run_config = validated({"space": words, "search": {"target_format": "nemotron_nas"}})
    space = configured_space(config, run_config.space, run_config.search.target_format)
    assert space.layers[0].attention == ("parent", "gqa:2")
    assert space.layers[1].attention == ("parent", "gqa:2", "noop")
    assert {layer.ffn for layer in space.layers} == {("parent", "ffn:512", "ffn:256", "noop")}
    native = configured_space(config, run_config.space, "native")
    assert native.layers[0].attention == ("parent", "gqa:2", "window:16", "linear", "noop")
    with pytest.raises(ParentError, match="qwen3 is not one of llama"):
        configured_space(read_config(save_parent(tmp_path / "qwen3", "qwen3")), run_config.space, "nemotron_nas")
