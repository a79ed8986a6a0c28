"""Blockwise local distillation: what it minimises, and that its state survives anything bit for bit."""

import pytest
import torch

from puzzle_ray.blocks import load_stack, search_space
from puzzle_ray.checkpoint import read_config
from puzzle_ray.config import LibraryConfig
from puzzle_ray.distill.bld import LayerTrainer, Schedule, learning_rate, normalised_mse
from puzzle_ray.distill.library import TABLE, build_serially, checkpoint_name, unfinished_layers
from puzzle_ray.errors import NotFinite, OutOfOrder
from puzzle_ray.families import describe
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Store

CONFIG = LibraryConfig(
    tokens=256, calibration_tokens=64, validation_tokens=64, micro_batch_tokens=32, learning_rate=3e-3, checkpoint_every=3
)
SPACE = (("gqa:1", "linear", "noop"), ("ffn:24", "linear", "noop"))


def trainer(folder, config=CONFIG, index=1):
    model_config = read_config(folder)
    stack = load_stack(folder, describe(model_config), model_config, index, index + 1, torch.float32, ends=False)
    return LayerTrainer(index, stack, search_space(model_config, *SPACE, 8).layers[index], config)


def stream(t, positions):
    for position in positions:
        torch.manual_seed(t.schedule.data_number(position))
        x = torch.randn(2, 16, 32)
        with torch.no_grad():
            y = t.stack.run_layer(t.layer, 1, x)
        yield position, x, y


def test_normalised_mse_is_zero_for_a_copy_and_one_for_zeros():
    y = torch.randn(2, 3, 4)
    assert normalised_mse(y, y) == 0 and normalised_mse(torch.zeros_like(y), y) == 1


def test_learning_rate_warms_up_then_falls_to_a_tenth():
    rates = [learning_rate(1.0, step, 100, 0.1) for step in range(100)]
    assert (
        rates[0] == 0.1
        and max(rates) == rates[9] == 1.0
        and rates[9:] == sorted(rates[9:], reverse=True)
        and 0.1 <= rates[-1] < 0.11
    )


def test_both_validations_read_the_same_micro_batches_and_training_reads_others():
    schedule = Schedule(calibrate=2, validate=3, train=4)
    by_phase: dict[str, list[int]] = {}
    for position in range(schedule.positions):
        by_phase.setdefault(schedule.phase(position)[0], []).append(schedule.data_number(position))
    assert by_phase["validate_start"] == by_phase["validate_end"]
    numbers = by_phase["validate_start"] + by_phase["calibrate"] + by_phase["train"]
    assert sorted(numbers) == list(range(9))


def test_training_lowers_every_trainable_variants_validation_loss(parent_folder):
    t = trainer(parent_folder, CONFIG.model_copy(update={"tokens": 2048}))
    for item in stream(t, range(t.schedule.positions)):
        t.step(*item)
    rows = {f"{row.kind}/{row.variant}": row for row, _, _ in t.results()}
    assert rows.keys() == {"attention/gqa:1", "attention/linear", "attention/noop", "ffn/ffn:24", "ffn/linear", "ffn/noop"}
    for name, row in rows.items():
        if name.endswith("noop"):
            assert row.start_loss == row.final_loss and row.kept == "start" and row.tokens == 0
        else:
            assert row.final_loss < row.start_loss and row.kept == "trained" and row.tokens == 2048


def test_the_parents_weights_are_not_touched(parent_folder):
    t = trainer(parent_folder)
    before = {k: v.clone() for k, v in t.layer.state_dict().items()}
    for item in stream(t, range(t.schedule.positions)):
        t.step(*item)
    assert all(torch.equal(v, before[k]) for k, v in t.layer.state_dict().items())


@pytest.mark.parametrize("cut", [2, 3, 4, 7, 11])
def test_a_restored_trainer_ends_with_the_same_bits(parent_folder, cut):
    whole, first, second = (trainer(parent_folder) for _ in range(3))
    items = list(stream(whole, range(whole.schedule.positions)))
    for item in items:
        whole.step(*item)
    for item in items[:cut]:
        first.step(*item)
    second.restore(*first.checkpoint())
    assert second.position == cut - 1
    for item in items:  # those already done are ignored
        second.step(*item)
    for (row_a, state_a, curve_a), (row_b, state_b, curve_b) in zip(whole.results(), second.results(), strict=True):
        assert row_a == row_b and curve_a == curve_b and all(torch.equal(state_a[k], state_b[k]) for k in state_a)


def test_a_gap_is_refused(parent_folder):
    t = trainer(parent_folder)
    with pytest.raises(OutOfOrder, match="micro-batch 1 came, but 0 is the next"):
        t.step(*next(stream(t, [1])))


def test_a_parent_that_is_not_finite_is_named(parent_folder):
    t = trainer(parent_folder)
    x = torch.randn(2, 16, 32)
    with pytest.raises(NotFinite, match="layer 1, variant parent, micro-batch 0"):
        t.step(0, x, torch.full_like(x, float("nan")))


def test_a_variant_that_diverges_is_reported_and_the_others_go_on(parent_folder):
    t = trainer(parent_folder)
    items = list(stream(t, range(t.schedule.positions)))
    start = t.schedule.calibrate + t.schedule.validate
    for item in items[:start]:
        t.step(*item)
    bad = next(c for c in t.candidates if c.name == "ffn/ffn:24")
    with torch.no_grad():
        next(bad.module.parameters()).fill_(float("nan"))
    for item in items[start:]:
        t.step(*item)
    rows = {f"{row.kind}/{row.variant}": row for row, _, _ in t.results()}
    assert f"layer 1, variant ffn:24, micro-batch {start}" in rows["ffn/ffn:24"].failure and rows["ffn/ffn:24"].kept == "start"
    assert rows["attention/gqa:1"].failure == "" and rows["attention/gqa:1"].tokens == 256
    kept = {row.variant: state for row, state, _ in t.results() if row.kind == "ffn"}
    assert all(torch.isfinite(v).all() for v in kept["ffn:24"].values())


def test_an_interrupted_library_goes_on_and_equals_an_undisturbed_one(parent_folder, random_tokens, tmp_path):
    space = search_space(read_config(parent_folder), *SPACE, 8)
    store = Store(str(tmp_path))

    class Stop(Exception):
        pass

    class Interrupting(Quiet):
        """Stops the stage after some micro-batches."""

        def __init__(self, after):
            self.after = after

        def stage(self, name, total, unit):
            from contextlib import contextmanager

            outer = self

            class Bar:
                def advance(self, count=1, **facts):
                    outer.after -= count
                    if outer.after < 0:
                        raise Stop

            @contextmanager
            def opened():
                yield Bar()

            return opened()

    whole = build_serially(str(parent_folder), space, CONFIG, random_tokens, 0, store.step("whole", {}, {}), Quiet())
    step = store.step("cut", {}, {})
    with pytest.raises(Stop):
        build_serially(str(parent_folder), space, CONFIG, random_tokens, 0, step, Interrupting(7))
    assert step.exists(checkpoint_name(0)) and not step.finished and len(unfinished_layers(space, step)) == 3
    cut = build_serially(str(parent_folder), space, CONFIG, random_tokens, 0, step, Quiet())
    assert cut.rows() == whole.rows() and cut.curves() == whole.curves() and step.names("checkpoints") == []
    for name in whole.step.names():
        if name.endswith(".safetensors"):
            a, b = whole.step.read_tensors(name)[0], cut.step.read_tensors(name)[0]
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert TABLE in step.names()
