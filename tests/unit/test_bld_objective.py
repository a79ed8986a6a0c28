"""The terms of local distillation's loss, against the formulas written out and against what the modules themselves put out."""

import numpy as np
import pytest
import torch
from layer_trainers import assert_same, changed, restored, rows_of, run, stream, trainer

from puzzle_ray.artifacts import KINDS, LayerChoice
from puzzle_ray.config import load
from puzzle_ray.distill.candidate import states_by_kind
from puzzle_ray.distill.losses import LayerPass, normalised_mse, training_loss
from puzzle_ray.distill.settings import BlockLoss
from puzzle_ray.errors import ConfigError
from puzzle_ray.models.blocks import swapped

WEIGHTS = {"block": 0.5, "subblock": 2.0, "cosine": 0.25}


def by_hand(weights, replaced, child, parent):
    """The loss in numpy, in float64."""
    (x, m, y), (_, m0, y0) = ([v.double().numpy() for v in (p.start, p.middle, p.end)] for p in (child, parent))

    def nmse(a, b):
        return np.mean((a - b) ** 2) / np.mean(b**2)

    added = {"attention": nmse(m - x, m0 - x), "ffn": nmse(y - m, y0 - m0)}
    cosine = np.sum(y * y0, -1) / (np.linalg.norm(y, axis=-1) * np.linalg.norm(y0, axis=-1))
    return (
        weights["block"] * nmse(y, y0)
        + weights["subblock"] * np.mean([added[kind] for kind in replaced])
        + weights["cosine"] * np.mean(1 - cosine)
    )


@pytest.mark.parametrize("replaced", [("attention",), ("ffn",), KINDS])
@pytest.mark.parametrize("off", [(), ("block",), ("subblock",), ("cosine",), ("subblock", "cosine"), ("block", "subblock")])
def test_the_loss_is_the_weighted_sum_of_its_terms(replaced, off):
    torch.manual_seed(0)
    x, *others = torch.randn(5, 2, 7, 8)
    child, parent = LayerPass(x, *others[:2]), LayerPass(x, *others[2:])
    weights = {name: 0.0 if name in off else value for name, value in WEIGHTS.items()}
    found = training_loss(BlockLoss(**weights), replaced, child, parent)
    assert float(found) == pytest.approx(by_hand(weights, replaced, child, parent), rel=1e-5)


def test_every_term_is_zero_for_a_copy_and_the_subblock_term_one_for_a_noop():
    torch.manual_seed(0)
    x, m, y = torch.randn(3, 2, 7, 8)
    parent = LayerPass(x, m, y)
    assert float(training_loss(BlockLoss(**WEIGHTS), KINDS, parent, parent)) == pytest.approx(0.0, abs=1e-6)
    alone = BlockLoss(block=0, subblock=1, cosine=0)
    assert float(training_loss(alone, ("attention",), LayerPass(x, x, x), parent)) == 1
    assert float(training_loss(alone, ("ffn",), LayerPass(x, m, m), parent)) == 1


def test_without_the_cosine_it_is_the_papers_loss_bit_for_bit():
    x, m, y, m1, y1 = torch.randn(5, 2, 7, 8)
    found = training_loss(BlockLoss(cosine=0), ("attention",), LayerPass(x, m1, y1), LayerPass(x, m, y))
    assert torch.equal(found, normalised_mse(y1, y))


def first_losses(t):
    """Of every candidate, the loss at its first training micro-batch, from whole layers and from what their modules put out."""
    _, x, y = next(stream(t, [t.schedule.calibrate + t.schedule.validate]))
    put_out = {}

    def run_layer(layer):
        hooks = [
            layer.get_submodule(t.stack.descriptor.module(kind)).register_forward_hook(
                lambda module, args, out, kind=kind: put_out.__setitem__(kind, out[0] if isinstance(out, tuple) else out)
            )
            for kind in KINDS
        ]
        with torch.no_grad():
            end = t.stack.run_layer(layer, t.index, x)
        for hook in hooks:
            hook.remove()
        return {"block": end, **put_out}

    parent, found = run_layer(t.layer), {}
    assert torch.equal(parent["block"], y)
    for c in t.candidates:
        layer = swapped(t.layer, c.choice, t.stack.descriptor, t.stack.config, states_by_kind(c.start))
        child = run_layer(layer)
        subblock = np.mean([float(normalised_mse(child[kind], parent[kind])) for kind in c.choice.replaced])
        cosine = 1 - float(torch.nn.functional.cosine_similarity(child["block"], y, dim=-1).mean())
        parts = (float(normalised_mse(child["block"], y)), subblock, cosine)
        found[t.space.entry(c.choice)] = sum(w * p for w, p in zip(WEIGHTS.values(), parts, strict=True))
    return found


def test_a_trainers_loss_is_that_of_whole_layers_and_of_their_modules_outputs(parent_folder):
    t = trainer(parent_folder, changed(loss=WEIGHTS))
    before = t.schedule.calibrate + t.schedule.validate
    run(t, range(before))
    expected = first_losses(t)
    run(t, [before])
    learned = [c for c in t.candidates if c.optimizer]
    assert len(learned) == 4
    for c in learned:
        assert c.record.curve[0] == pytest.approx(expected[t.space.entry(c.choice)], rel=1e-4)


def test_whatever_is_minimised_variants_are_judged_by_the_block_loss(parent_folder):
    """Every objective lowers its own loss; validation is the block's output under all of them, and equal before training."""
    losses = {
        "block": {"cosine": 0},
        "subblock": {"block": 0, "subblock": 1, "cosine": 0},
        "cosine": {"block": 0, "cosine": 1},
        "default": {},
    }
    found = {name: run(trainer(parent_folder, changed(tokens=2048, loss=loss))) for name, loss in losses.items()}
    starts = [[row.start_loss for row in rows_of(t).values()] for t in found.values()]
    assert all(start == starts[0] for start in starts)
    for name, t in found.items():
        c = next(c for c in t.candidates if c.choice == LayerChoice(attention="gqa:1"))
        assert np.mean(c.record.curve[-8:]) < 0.95 * np.mean(c.record.curve[:8]), name
        kept = swapped(t.layer, c.choice, t.stack.descriptor, t.stack.config, states_by_kind(c.weights()))
        with torch.no_grad():
            values = [float(normalised_mse(t.stack.run_layer(kept, 1, x), y)) for _, x, y in stream(t, range(2, 4))]
        assert c.record.final_loss == pytest.approx(np.mean(values), rel=1e-5)


def test_a_trainer_with_all_terms_is_restored_to_the_same_bits(parent_folder):
    config = changed(loss=WEIGHTS)
    assert_same(run(trainer(parent_folder, config)), restored(parent_folder, 6, config=config))


def test_a_loss_without_terms_is_refused():
    with pytest.raises(ConfigError, match="all loss weights are 0; set library.loss.block"):
        load(None, None, ("library.loss={block: 0, cosine: 0}",))
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        load(None, None, ("library.loss.cosin=1",))
