"""A child with windows decodes with an assistant's drafts, or drafts for another model, and the tokens are those without drafts."""

import copy

import pytest
import torch
from small_models import save_parent

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.models.child import load_model, new_child, read_config, save_child
from puzzle_ray.surgery.kv_cache import cache_from

CHOICES = [LayerChoice("window:5"), LayerChoice("noop"), LayerChoice("window:9")]
PROMPTS = ([3, 4, 5, 3, 4, 5, 3, 4, 5, 3, 4, 7, 8, 9, 3, 4], [9, 9, 2])


def models(folder, model_type):
    parent = save_parent(folder / "parent", model_type, tie_word_embeddings=False)
    torch.manual_seed(2)
    child = new_child(read_config(parent), CHOICES, torch.float32).eval()
    with torch.no_grad():
        for parameter in child.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    save_child(child, parent, folder / "child")
    return load_model(parent), load_model(folder / "child")


def tokens(model, prompt, **options):
    ids = torch.tensor([prompt])
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, max_new_tokens=24, **settings, **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "phi3"])  # gemma3_text has windows of its own besides
def test_drafts_change_no_token(tmp_path, model_type):
    parent, child = models(tmp_path, model_type)
    twin, forwards = copy.deepcopy(child), []
    child.register_forward_hook(lambda *_: forwards.append(1))
    for prompt in PROMPTS:
        alone = tokens(child, prompt)
        assert len(set(alone)) > 1
        for drafts in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": parent}, {"assistant_model": twin}):
            assert tokens(child, prompt, **drafts) == alone
        assert tokens(parent, prompt, assistant_model=child) == tokens(parent, prompt)
        forwards.clear()
        tokens(child, prompt, assistant_model=twin)
        assert len(forwards) < len(alone)  # a twin's drafts are right, so that a pass gives more than one token


def test_a_cache_that_is_returned_still_holds_no_more_than_the_windows(tmp_path):
    _, child = models(tmp_path, "llama")
    ids = torch.tensor([PROMPTS[0]])
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True}
    found = child.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, **settings)
    assert [layer.keys.shape[2] for layer in cache_from(found).layers] == [4, 19, 8]
