"""One layer's trainer on random activations, for tests of local distillation."""

from __future__ import annotations

import torch

from puzzle_ray.distill.bld import LayerTrainer
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.models.blocks import load_stack
from puzzle_ray.models.child import read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.variants.space import search_space

CONFIG = LibraryConfig(
    tokens=256, calibration_tokens=64, validation_tokens=64, micro_batch_tokens=32, learning_rate=3e-3, checkpoint_every=3
)
SPACE = (("gqa:1", "linear", "noop"), ("ffn:24", "linear", "noop"))


def changed(**changes) -> LibraryConfig:
    """CONFIG with some settings replaced, validated."""
    return LibraryConfig.model_validate(CONFIG.model_dump() | changes)


def trainer(folder, config=CONFIG, index=1, space=SPACE, layer_space=None, part=(0, 1)) -> LayerTrainer:
    model_config = read_config(folder)
    stack = load_stack(folder, describe(model_config), model_config, index, index + 1, torch.float32, ends=False)
    layer_space = layer_space or search_space(model_config, *space, 8).layers[index]
    return LayerTrainer(index, stack, layer_space, config, choices=layer_space.trained[part[0] :: part[1]])


def stream(t: LayerTrainer, positions):
    """(position, input, parent's output), a function of the position's data number."""
    for position in positions:
        torch.manual_seed(t.schedule.data_number(position))
        x = torch.randn(2, 16, 32)
        with torch.no_grad():
            y = t.stack.run_layer(t.layer, t.index, x)
        yield position, x, y


def run(t: LayerTrainer, positions=None) -> LayerTrainer:
    for item in stream(t, range(t.schedule.positions) if positions is None else positions):
        t.step(*item)
    return t


def restored(folder, cut, **settings) -> LayerTrainer:
    """A trainer that takes over after `cut` positions from another one's checkpoint, and ends."""
    first, second = trainer(folder, **settings), trainer(folder, **settings)
    run(first, range(cut))
    hand_over(first, second)
    assert second.position == cut - 1
    return run(second)  # what is done already is ignored


def hand_over(first: LayerTrainer, second: LayerTrainer) -> None:
    """The second one continues from checkpoints of the first one's candidates."""
    for candidate in first.candidates:
        tensors, about = candidate.checkpoint()
        second.restore(candidate.choice, tensors | candidate.start_tensors(), about)


def assert_same(a: LayerTrainer, b: LayerTrainer) -> None:
    """The same rows, curves and bits."""
    for (row_a, state_a, curve_a), (row_b, state_b, curve_b) in zip(a.results(), b.results(), strict=True):
        assert row_a == row_b and curve_a == curve_b and state_a.keys() == state_b.keys()
        assert all(torch.equal(state_a[k], state_b[k]) for k in state_a)


def rows_of(t: LayerTrainer):
    return {f"{row.kind}/{row.variant}": row for row, _, _ in t.results()}
