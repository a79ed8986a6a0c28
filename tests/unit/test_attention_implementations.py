"""A child gives the same logits whatever attention function transformers runs it with, or says which one it cannot have."""

import importlib

import pytest
import torch
from small_models import save_parent
from transformers import AutoModelForCausalLM

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.errors import ConfigError
from puzzle_ray.families.registry import families
from puzzle_ray.models.child import new_child, read_config, save_child
from puzzle_ray.surgery.subblocks import GroupedAttention

IDS = torch.arange(48).remainder(96).reshape(2, 24)
PADDED = torch.cat([torch.tensor([[0] * 7 + [1] * 17]), torch.ones(1, 24, dtype=torch.long)])
CHOICES = [LayerChoice("noop", "ffn:24"), LayerChoice("gqa:1"), LayerChoice("window:5", "linear")]
MORE = [LayerChoice("gqa:1", "noop"), LayerChoice("linear"), LayerChoice("parent", "ffn:24")]
EAGER_ALONE = ("gemma2", "gpt_neo")  # in stock transformers


def saved(folder, model_type, choices, **changes):
    parent = save_parent(folder / "parent", model_type, **changes)
    torch.manual_seed(1)
    child = new_child(read_config(parent), choices, torch.float32).eval()
    with torch.no_grad():
        for parameter in child.parameters():  # biases of new blocks, too
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_child(child, parent, folder / "child")
    return (folder / "child").rename(folder / f"{model_type}_child")


def loaded(folder, implementation, **options):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation, **options).eval()


def tokens(model):
    out = model.generate(IDS, attention_mask=PADDED, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    return out[:, IDS.shape[1] :].tolist()


@pytest.mark.parametrize("choices", [CHOICES, MORE], ids=["first", "more"])
@pytest.mark.parametrize("model_type", sorted(families()))
def test_eager_and_sdpa_give_the_same_logits_and_tokens(tmp_path, model_type, choices):
    folder = saved(tmp_path, model_type, choices)
    eager = loaded(folder, "eager")
    assert eager.config._attn_implementation == "eager"
    if model_type in EAGER_ALONE:
        with pytest.raises(
            ValueError, match="does not support an attention implementation through.*scaled_dot_product_attention"
        ):
            loaded(folder, "sdpa")
        return
    sdpa = loaded(folder, "sdpa")
    with torch.no_grad():
        assert torch.allclose(eager(IDS).logits, sdpa(IDS).logits, atol=2e-4, rtol=1e-4)
    assert tokens(eager) == tokens(sdpa)
    sdpa.set_attn_implementation("eager")  # afterwards is as good
    with torch.no_grad():
        assert torch.equal(eager(IDS).logits, sdpa(IDS).logits)


def test_gpt2s_own_code_in_the_folder_does_so_too(tmp_path, monkeypatch):
    folder = saved(tmp_path, "gpt2", MORE, scale_attn_by_inverse_layer_idx=True)
    ours = loaded(folder, "sdpa")
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module(f"{folder.name}.modeling_puzzle_gpt2").PuzzleGPT2LMHeadModel
    with torch.no_grad():
        for implementation in ("eager", "sdpa"):
            model = own.from_pretrained(folder, attn_implementation=implementation).eval()
            assert torch.allclose(model(IDS).logits, ours(IDS).logits, atol=2e-4, rtol=1e-4)


def test_a_window_refuses_what_has_no_masks_for_it_by_name(tmp_path):
    folder = saved(tmp_path, "llama", [CHOICES[2], *MORE[1:]])
    said = r"attn_implementation: is '{}', and layers with windows of their own need masks of their own; use sdpa or eager"
    with pytest.raises(ConfigError, match=said.format("flex_attention")):
        loaded(folder, "flex_attention")
    model = loaded(folder, "sdpa")
    model.config._attn_implementation = "flash_attention_2"  # as set_attn_implementation does where it is installed
    with pytest.raises(ConfigError, match=said.format("flash_attention_2")), torch.no_grad():
        model(IDS)
    neo = loaded(saved(tmp_path / "neo", "gpt_neo", [LayerChoice(), LayerChoice("gqa:1"), LayerChoice()]), "eager")
    local = neo.get_submodule("transformer.h.1.attn.attention")
    neo.config._attn_implementation = "flash_attention_2"  # which transformers has for GPT-Neo's own attention
    for run in (lambda: local(IDS.float()[None, :, :1].expand(1, 2, 32)), lambda: GroupedAttention(local, local.descriptor, 4)):
        with pytest.raises(ConfigError, match=said.format("flash_attention_2")):
            run()
