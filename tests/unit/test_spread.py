"""A model spread over several devices: layers in runs of equal bytes, all else on the first, and the same results."""

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from small_models import save_parent

from puzzle_ray.evaluation.evaluate import greedy_sample
from puzzle_ray.models.blocks import CPU
from puzzle_ray.models.child import load_model
from puzzle_ray.models.spread import _places, load_on, spread

META = torch.device("meta")
IDS = torch.arange(1, 33).view(2, 16)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_spread_model_gives_the_same_bits(family, tmp_path):
    folder = save_parent(tmp_path, family)
    byte_tokenizer().save_pretrained(folder)
    one, several = load_on(folder, torch.float32, [CPU]), load_on(folder, torch.float32, [CPU, torch.device("cpu", 0)])
    with torch.inference_mode():
        assert torch.equal(several(IDS, use_cache=False).logits, one(IDS, use_cache=False).logits)
    texts = {greedy_sample(model, byte_tokenizer(), "ab", 4) for model in (one, several)}
    assert len(texts) == 1, "with a cache, too"


@pytest.mark.parametrize("tied", [False, True])
def test_layers_lie_on_their_devices_and_fetch_what_they_are_given(tied, tmp_path):
    model = spread(load_model(save_parent(tmp_path, "llama", num_hidden_layers=4, tie_word_embeddings=tied)), [CPU, META])
    where = [{parameter.device for parameter in layer.parameters()} for layer in model.model.layers]
    assert where[0] == {CPU} and where[3] == {META} and where == sorted(where, key=lambda d: d == {META})
    ends = {name: p.device for name, p in model.named_parameters() if ".layers." not in name}
    assert ends and set(ends.values()) == {CPU} == {model.device}
    hidden = torch.zeros(1, 5, model.config.hidden_size)
    positions = torch.arange(5).unsqueeze(0)
    found = model.model.layers[3](hidden, attention_mask=None, position_embeddings=model.model.rotary_emb(hidden, positions))
    assert (found[0] if isinstance(found, tuple) else found).device == META


def test_devices_hold_about_equal_bytes_in_the_order_of_layers():
    assert _places(0, [1] * 6, [CPU, META]) == [CPU] * 3 + [META] * 3
    assert _places(4, [1] * 4, [CPU, META]) == [META] * 4, "the first has embedding and head"
    assert _places(0, [0, 5, 0, 5], [CPU, META]) == [CPU, CPU, META, META], "layers that are gone take nothing"
    assert len(_places(1, [2], [CPU, META, META])) == 1
