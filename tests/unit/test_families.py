"""Families: what their configs leave out, what is refused by name, and types without a file that are shaped like Llama."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import save_parent, tiny_config
from transformers import AutoModelForCausalLM

from puzzle_ray.artifacts import PARENT, LayerChoice
from puzzle_ray.distill.child_loss import ChildLoss
from puzzle_ray.distill.settings import GkdConfig
from puzzle_ray.errors import ConfigError, ParentError
from puzzle_ray.families.registry import ffn_width, num_kv_heads
from puzzle_ray.models.blocks import load_stack
from puzzle_ray.models.child import assemble, load_model, new_child, read_config, save_child
from puzzle_ray.models.child_classes import child_classes
from puzzle_ray.models.describe import _shrunk, check_resizing, describe
from puzzle_ray.models.manifest import check_weights
from puzzle_ray.profiling.measure import stack_config
from puzzle_ray.surgery.kv_cache import cache_from, continuing
from puzzle_ray.variants.space import search_space

IDS = torch.arange(60).remainder(96).reshape(2, 30)
MIXED = ["sliding_attention", "full_attention", "full_attention"]


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neo", "opt"])
def test_a_config_without_kv_heads_learns_and_keeps_them(model_type, tmp_path):
    folder = save_parent(tmp_path / "parent", model_type)
    config = read_config(folder)
    assert (num_kv_heads(config), ffn_width(config)) == (4, 48)
    space = search_space(config, ("gqa:50%",), ("ffn:50%",), 8)
    assert space.layers[0].attention == (PARENT, "gqa:2") and space.layers[0].ffn == (PARENT, "ffn:24")
    child = new_child(read_config(folder), [LayerChoice("gqa:2")] * 3, torch.float32)
    child.save_pretrained(tmp_path / "child")
    assert json.loads((tmp_path / "child/config.json").read_text())["num_key_value_heads"] == 4
    loaded = load_model(tmp_path / "child")
    assert [layer.keys.shape[1] for layer in cache_from(loaded(IDS, use_cache=True)).layers] == [2, 2, 2]


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("gpt2", {"add_cross_attention": True}, "gpt2 with add_cross_attention=True"),
        ("opt", {"word_embed_proj_dim": 16}, "opt with word_embed_proj_dim=16 other than hidden_size=32"),
        ("opt", {"do_layer_norm_before": False}, "opt with do_layer_norm_before=False"),
        ("gemma2", {"use_bidirectional_attention": True}, "gemma2 with use_bidirectional_attention=True"),
        ("llama", {"is_causal": False}, "llama with is_causal=False is not supported"),
        (
            "llama",
            {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
            "llama with layer_types of full_att",
        ),
        (
            "mistral",
            {"sliding_window": 8, "layer_types": ["full_attention"] * 3},
            "mistral with layer_types of full_attention is not",
        ),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"] * 3},
            "qwen3 with layer_types of sliding_attention has no sliding_window",
        ),
        ("smollm3", {"layer_types": ["full_attention"] * 2 + ["chunked_attention"]}, "it has layers of type chunked_attention"),
        ("cohere", {}, "family 'cohere' is not supported: layer 0 consists of input_layernorm, mlp, self_attn"),
        ("stablelm", {"use_parallel_residual": True}, "family 'stablelm' is not supported: layer 0 consists of"),
        ("exaone", {}, "family 'exaone' is not supported: transformers reads its weights under other names than the files have"),
        ("mamba", {}, "family 'mamba' is not supported"),
        ("mixtral", {}, r"family 'mixtral' is not supported: it has FFNs of several experts \(num_local_experts=8\)"),
        ("gpt_oss", {}, "family 'gpt_oss' is not supported: it has FFNs of several experts"),
        ("deepseek_v3", {}, "family 'deepseek_v3' is not supported: it has FFNs of several experts"),
        ("arcee", {}, "family 'arcee' is not supported: layer 0 has no linear mlp.gate_proj"),
        ("bert", {}, "family 'bert' is not supported"),
        ("t5", {}, "family 't5' is not supported: transformers has no causal language model"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(model_type, changes, words):
    with pytest.raises(ParentError, match=words):
        describe(tiny_config(model_type, **changes))


@torch.no_grad()
def test_a_child_of_an_unknown_type_is_assembled_distilled_and_a_parent_itself(tmp_path):
    """All of these look at the child's config, whose layers differ."""
    folder = save_parent(tmp_path / "parent", "helium")
    choices = [LayerChoice("gqa:1"), LayerChoice("noop", "ffn:24"), LayerChoice("linear", "linear")]
    child = new_child(read_config(folder), choices, torch.float32).eval()
    save_child(child, folder, tmp_path / "child")
    config = read_config(tmp_path / "child")
    assert describe(config) == describe(read_config(folder))
    loss = ChildLoss(GkdConfig(), child.config).terms(child, load_model(folder), IDS)[0]
    assert torch.isfinite(loss) and check_weights(tmp_path / "child", config) == ()


@pytest.mark.parametrize(
    ("model_type", "attention", "ffn", "words"),
    [
        (
            "stablelm",
            ("gqa:1", "noop"),
            ("noop",),
            "space.attention: layers of .* cannot have another number of KV heads; leave out gqa",
        ),
        (
            "bitnet",
            ("noop",),
            ("ffn:24",),
            "space.ffn: layers of family 'bitnet' cannot have an FFN of another width; leave out ffn",
        ),
        ("stablelm", ("noop", "linear"), ("ffn:24",), ""),
        ("helium", ("gqa:1",), ("ffn:24",), ""),
    ],
)
def test_an_unknown_type_whose_layers_cannot_be_made_smaller_is_refused_with_these_variants(model_type, attention, ffn, words):
    config = tiny_config(model_type)
    space = search_space(config, attention, ffn, 8)
    if not words:
        return check_resizing(config, space)
    with pytest.raises(ConfigError, match=words):
        check_resizing(config, space)


def test_the_check_of_an_unknown_type_looks_at_a_layer_of_every_kind():
    types = ["full_attention"] * 4 + ["sliding_attention"] * 2
    settings = {"num_hidden_layers": 6, "layer_types": types, "no_rope_layers": [1, 1, 1, 0, 1, 1], "hidden_act": "silu"}
    small = _shrunk(settings)
    assert small["num_hidden_layers"] == 3 and small["no_rope_layers"] == [1, 0, 1] and small["layer_types"] == types[2:5]
    assert (
        _shrunk({"num_hidden_layers": 6})["num_hidden_layers"] == 2
        and _shrunk({"num_hidden_layers": 1})["num_hidden_layers"] == 1
    )


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "helium"])
@torch.no_grad()
def test_a_window_that_the_familys_code_does_not_read_is_none(model_type, tmp_path):
    """Left over in config.json, it would make masks and caches whose layers see all tokens."""
    folder = save_parent(tmp_path / "parent", model_type)
    logits = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    settings = json.loads((folder / "config.json").read_text()) | {"sliding_window": 6}
    (folder / "config.json").write_text(json.dumps(settings))
    config = read_config(folder)
    stack = load_stack(folder, describe(config), config, 0, 3, torch.float32)
    hidden = stack.embed(IDS)
    for index in range(3):
        hidden = stack.run_layer(stack.layer(index), index, hidden)
    assert torch.equal(stack.logits(hidden), logits)
    (remark,) = check_weights(folder, config)
    assert "sliding_window=6" in remark and "every token sees all before it" in remark
    save_child(assemble(folder, config, [LayerChoice()] * 3, {}, torch.float32), folder, tmp_path / "child")
    child = load_model(tmp_path / "child")
    cache = cache_from(child(IDS[:, :20], use_cache=True))
    assert torch.allclose(child(IDS[:, 20:], **continuing(cache)).logits, logits[:, 20:], atol=1e-4)
    assert "sliding_window" not in json.loads((tmp_path / "child/config.json").read_text())


@pytest.mark.parametrize("model_type", ["seed_oss", "helium"])
@torch.no_grad()
def test_an_unknown_type_shaped_like_llama_is_cut_and_put_together_like_it(model_type, tmp_path):
    folder = save_parent(tmp_path / "parent", model_type)
    config = read_config(folder)
    assert describe(config).model_class == child_classes(model_type)[1].__mro__[2].__name__
    stack = load_stack(folder, describe(config), config, 0, 3, torch.float32)
    hidden = stack.embed(IDS)
    for index in range(3):
        hidden = stack.run_layer(stack.layer(index), index, hidden)
    logits = load_model(folder)(IDS).logits
    assert torch.equal(stack.logits(hidden), logits)
    assert torch.equal(assemble(folder, config, [LayerChoice()] * 3, {}, torch.float32)(IDS).logits, logits)


@torch.no_grad()
def test_a_child_of_an_unknown_type_loads_in_a_process_that_has_not_seen_its_parent(tmp_path):
    folder = save_parent(tmp_path / "parent", "helium")
    choices = [LayerChoice("gqa:1"), LayerChoice("noop", "ffn:24"), LayerChoice("linear", "linear")]
    child = new_child(read_config(folder), choices, torch.float32).eval()
    save_child(child, folder, tmp_path / "child")
    script = (
        "import sys, torch; from puzzle_ray.models.child import load_model;"
        f"print(float(load_model({str(tmp_path / 'child')!r})(torch.arange(30)[None]).logits.double().sum()))"
    )
    fresh = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert fresh.returncode == 0, fresh.stderr
    assert float(fresh.stdout) == pytest.approx(float(child(torch.arange(30)[None]).logits.double().sum()))


def test_settings_with_an_entry_per_layer_suit_stacks_that_are_deeper_than_the_parent():
    config = tiny_config("smollm3", no_rope_layers=[1, 1, 0])
    deep = stack_config(config, "full_attention", 8)
    assert deep.no_rope_layers == [1, 1, 0, 1, 1, 0, 1, 1] and stack_config(config, "full_attention", 2).no_rope_layers == [1, 1]
    with torch.device("meta"):
        new_child(deep, [LayerChoice("noop", "noop")] * 8, torch.float32)
