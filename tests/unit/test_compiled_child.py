"""A child goes through torch.compile in one piece, as vLLM compiles models unless it is told not to."""

import pytest
import torch
from small_models import save_parent
from torch._dynamo.testing import CompileCounter

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.families.registry import families
from puzzle_ray.models.child import load_model, new_child, read_config, save_child

IDS = torch.arange(24).remainder(96).reshape(1, 24)
CHOICES = [LayerChoice("noop", "ffn:24"), LayerChoice("gqa:1", "linear"), LayerChoice("linear", "noop")]


FAST = ("gpt2", "llama")  # a few seconds each


@pytest.mark.parametrize("model_type", [pytest.param(f, marks=() if f in FAST else pytest.mark.wide) for f in sorted(families())])
@torch.no_grad()
def test_it_is_compiled_in_one_piece_and_gives_the_same(model_type, tmp_path):
    parent = save_parent(tmp_path / "parent", model_type)
    torch.manual_seed(1)
    save_child(new_child(read_config(parent), CHOICES, torch.float32).eval(), parent, tmp_path / "child", {})
    child = load_model(tmp_path / "child")
    expected = child(IDS, use_cache=False).logits
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(child, fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected)
    assert counter.frame_count == 1
