"""Families: what their configs leave out, what is refused by name, and types without a file that are shaped like Llama."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import save_parent, tiny_config

from puzzle_ray.artifacts import PARENT, LayerChoice
from puzzle_ray.errors import ParentError
from puzzle_ray.families.registry import ffn_width, num_kv_heads
from puzzle_ray.models.blocks import load_stack
from puzzle_ray.models.child import assemble, load_model, new_child, read_config, save_child
from puzzle_ray.models.child_classes import child_classes
from puzzle_ray.models.describe import describe
from puzzle_ray.surgery.kv_cache import cache_from
from puzzle_ray.variants.space import search_space

IDS = torch.arange(60).remainder(96).reshape(2, 30)


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
        ("cohere", {}, "family 'cohere' is not supported: layer 0 consists of input_layernorm, mlp, self_attn"),
        ("stablelm", {"use_parallel_residual": True}, "family 'stablelm' is not supported: layer 0 consists of"),
        ("mamba", {}, "family 'mamba' is not supported"),
        ("mixtral", {}, "family 'mixtral' is not supported: layer 0 has no linear mlp.gate_proj"),
        ("bert", {}, "family 'bert' is not supported"),
        ("t5", {}, "family 't5' is not supported: transformers has no causal language model"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(model_type, changes, words):
    with pytest.raises(ParentError, match=words):
        describe(tiny_config(model_type, **changes))


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
