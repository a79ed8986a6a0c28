"""The losses of global distillation a few tokens at a time: the same values and gradients as from whole logits, which never exist."""

import pytest
import torch
from gkd_trainers import CONFIG, new_trainer
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from puzzle_ray.distill.curriculum import gkd_steps
from puzzle_ray.distill.head_losses import head_losses, layers_cosine_distance
from puzzle_ray.distill.losses import cosine_distance, next_labels
from puzzle_ray.models.head import CHUNK_ELEMENTS, Head

VOCAB, HIDDEN = 11, 8


def heads(**settings):
    """(child's, parent's)"""
    torch.manual_seed(0)
    found = []
    for bias in (True, False):
        linear = nn.Linear(HIDDEN, VOCAB, bias=bias)
        nn.init.normal_(linear.weight, std=0.7)
        found.append(Head(linear, **settings))
    found[1].linear.requires_grad_(False)
    return found


def inputs():
    generator = torch.Generator().manual_seed(1)
    final, parent = (2 * torch.randn(2, 5, HIDDEN, generator=generator) for _ in range(2))
    return final.requires_grad_(), parent, torch.randint(0, VOCAB, (2, 5), generator=generator)


def whole(child, final, parent, parent_final, ids, kl_weight, lm_weight):
    """By the formulas, from whole logits."""
    own, other = child.logits(final), parent.logits(parent_final)
    kl = functional.kl_div(
        own.log_softmax(-1).flatten(0, 1), other.log_softmax(-1).flatten(0, 1), log_target=True, reduction="batchmean"
    )
    lm = functional.cross_entropy(own[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return kl_weight * kl + lm_weight * lm, kl, lm


@pytest.mark.parametrize(("kl_weight", "lm_weight"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3)])
@pytest.mark.parametrize("tokens", [1, 3, 100])
@pytest.mark.parametrize("settings", [{}, {"divisor": 3.0, "softcap": 2.0}], ids=str)
def test_losses_and_gradients_are_those_of_the_formulas(kl_weight, lm_weight, tokens, settings, monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", tokens * VOCAB)
    child, parent = heads(**settings)
    final, parent_final, ids = inputs()
    wanted = [final, *child.linear.parameters()]
    expected = whole(child, final, parent, parent_final, ids, kl_weight, lm_weight)
    gradients = torch.autograd.grad(2 * expected[0], wanted)
    found = head_losses(child, final, parent, parent_final, next_labels(ids), kl_weight, lm_weight)
    own = torch.autograd.grad(2 * found[0], wanted)
    for a, b in zip((*found, *own), (*expected, *gradients), strict=True):
        torch.testing.assert_close(a, b)


def test_a_head_that_is_not_trained_gets_no_gradient():
    child, parent = heads()
    child.linear.requires_grad_(False)
    final, parent_final, ids = inputs()
    total, _, _ = head_losses(child, final, parent, parent_final, next_labels(ids), 1.0, 0.5)
    total.backward()
    assert child.linear.weight.grad is None and float(final.grad.abs().max()) > 0


@pytest.mark.parametrize("tokens", [2, 100])
def test_under_autocast_gradients_are_those_of_autocast(tokens, monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", tokens * VOCAB)
    child, parent = heads()
    final, parent_final, ids = inputs()
    wanted = [final, *child.linear.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        expected = whole(child, final, parent, parent_final, ids, 1.0, 0.5)
        found = head_losses(child, final, parent, parent_final, next_labels(ids), 1.0, 0.5)
    gradients, own = (torch.autograd.grad(losses[0], wanted) for losses in (expected, found))
    for a, b in zip((*found, *own), (*expected, *gradients), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


class Largest(TorchDispatchMode):
    """The most elements that a tensor has that is made while this is active."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def test_no_tensor_of_a_steps_losses_is_as_large_as_its_logits(monkeypatch):
    tokens, vocab = 64, 500
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 8 * vocab)
    child, parent = Head(nn.Linear(HIDDEN, vocab)), Head(nn.Linear(HIDDEN, vocab).requires_grad_(False))
    final = torch.randn(1, tokens, HIDDEN, requires_grad=True)
    ids = torch.randint(0, vocab, (1, tokens))
    with Largest() as seen:
        total, _, _ = head_losses(child, final, parent, torch.randn(1, tokens, HIDDEN), next_labels(ids), 1.0, 1.0)
        total.backward()
    assert seen.elements == 8 * vocab < tokens * vocab


@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_the_cosine_distance_of_layers_is_that_of_whole_tensors(tokens, monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", tokens * HIDDEN)
    generator = torch.Generator().manual_seed(0)
    child = [torch.randn(2, 5, HIDDEN, generator=generator).requires_grad_() for _ in range(3)]
    parent = [torch.randn(2, 5, HIDDEN, generator=generator) for _ in range(3)]
    expected, found = cosine_distance(child, parent), layers_cosine_distance(child, parent)
    assert torch.equal(expected, found)
    for a, b in zip(torch.autograd.grad(3 * expected, child), torch.autograd.grad(3 * found, child), strict=True):
        torch.testing.assert_close(a, b)


def test_accumulated_micro_batches_are_one_larger_step():
    """Two workers and two micro-batches each read what four workers read, and take the same step."""
    four = new_trainer(CONFIG.model_copy(update={"num_workers": 4}))
    accumulated = new_trainer(CONFIG.model_copy(update={"num_workers": 2, "gradient_accumulation": 2}))
    assert gkd_steps(four.config) == gkd_steps(accumulated.config) == four.total_steps
    for _ in range(2):
        assert four.step() == accumulated.step()
    for a, b in zip(four.parameters.values(), accumulated.parameters.values(), strict=True):
        assert torch.equal(a, b)
