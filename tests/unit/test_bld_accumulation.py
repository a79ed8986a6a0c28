"""An optimizer step over several micro-batches is one over all their tokens; the variants of a layer train alike in any company."""

import pytest
import torch
from layer_trainers import assert_same, changed, hand_over, restored, run, stream, trainer

from puzzle_ray.distill.library_checkpoints import LibraryCheckpoints, checkpoint_file
from puzzle_ray.distill.schedule import LearningRate, Schedule
from puzzle_ray.distill.settings import LEAST_CALIBRATION_TOKENS, LibraryConfig
from puzzle_ray.store import Store

ENTRY = (1, "attention", "gqa:1")
THREE = changed(gradient_accumulation=3, tokens=8 * 32)  # 3 steps of 3 micro-batches


def begun(folder, config):
    """A trainer before its first training micro-batch, and the position of that."""
    t = trainer(folder, config)
    position = t.schedule.calibrate + t.schedule.validate
    return run(t, range(position)), position


@pytest.mark.parametrize("loss", [{"block": 1, "cosine": 1}, {"block": 0, "cosine": 1}], ids=["both terms", "cosine"])
def test_a_step_over_micro_batches_is_a_step_over_all_their_tokens(parent_folder, loss):
    """Where the parent's output is as large in each: the normalised MSE of a micro-batch is divided by its own power."""
    many, first = begun(parent_folder, changed(gradient_accumulation=3, loss=loss))
    one, at = begun(
        parent_folder, changed(micro_batch_tokens=96, tokens=288, calibration_tokens=96, validation_tokens=96, loss=loss)
    )
    for a, b in zip(many.candidates, one.candidates, strict=True):
        b._load(a.weights())
    batches = []
    for _, x, y in stream(many, range(first, first + 3)):
        batches.append((x, y / y.square().mean().sqrt()))
    for n, (x, y) in enumerate(batches):
        before = [c.weights() for c in many.candidates]
        found = many.step(first + n, x, y)
        changes = any(not torch.equal(c.weights()[k], w[k]) for c, w in zip(many.candidates, before, strict=True) for k in w)
        assert (found is not None) == changes == (n == 2), "one step, at the end"
    one.step(at, *(torch.cat(part) for part in zip(*batches, strict=True)))
    trained = [(a, b) for a, b in zip(many.candidates, one.candidates, strict=True) if a.optimizer]
    assert len(trained) == 4
    for a, b in trained:
        assert a.record.curve == pytest.approx(b.record.curve, rel=1e-5) and len(a.record.curve) == 1
        for p, q in zip(a.parameters, b.parameters, strict=True):
            g, h = a.optimizer.state[p]["exp_avg"], b.optimizer.state[q]["exp_avg"]
            torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-6 * float(h.abs().max()))


def test_a_steps_loss_is_the_mean_of_its_micro_batches(parent_folder):
    """At a rate that changes nothing."""
    still = {"learning_rate": 1e-30, "tokens": 9 * 32}
    many, one = (run(trainer(parent_folder, changed(gradient_accumulation=n, **still))) for n in (3, 1))
    for a, b in zip(many.candidates, one.candidates, strict=True):
        means = [sum(b.record.curve[n : n + 3]) / 3 for n in range(0, len(b.record.curve), 3)]
        assert a.record.curve == pytest.approx(means, rel=1e-6)


def test_learning_rate_curve_and_tokens_count_whole_optimizer_steps(parent_folder):
    schedule = Schedule.of(THREE)
    assert (schedule.train, schedule.steps) == (9, 3), "8 micro-batches are rounded up"
    t = run(trainer(parent_folder, THREE))
    rate = LearningRate.of_bld(THREE.learning_rate, 3, THREE.warmup_fraction)
    trained = [(c, row) for c, (row, _, _) in zip(t.candidates, t.results(), strict=True) if c.optimizer]
    assert trained and all(len(c.record.curve) == 3 and row.tokens == 9 * 32 for c, row in trained)
    assert {c.optimizer.param_groups[0]["lr"] for c, _ in trained} == {rate.at(2)}


@pytest.mark.parametrize(("cut", "in_step"), [(7, False), (8, True), (9, True), (10, False)])
def test_a_trainer_restored_in_the_middle_of_a_step_ends_with_the_same_bits(parent_folder, cut, in_step):
    assert run(trainer(parent_folder, THREE), range(cut)).in_step(cut - 1) == in_step
    assert_same(run(trainer(parent_folder, THREE)), restored(parent_folder, cut, config=THREE))


def test_checkpoints_wait_for_the_end_of_a_step_unless_their_process_is_ended(parent_folder, tmp_path):
    artifact = Store(str(tmp_path)).artifact("library", {}, {})
    config = THREE.model_copy(update={"checkpoint_every": 1})
    t, kept = trainer(parent_folder, config), LibraryCheckpoints(artifact, config)
    first, saved = t.schedule.calibrate + t.schedule.validate, []
    for position, x, y in stream(t, range(first + 5)):
        t.step(position, x, y)
        kept.after(position, [t])
        if artifact.exists(checkpoint_file(*ENTRY)):
            saved.append(int(artifact.read_tensors(checkpoint_file(*ENTRY))[1]["position"]))
    assert saved == [1, 2, 3, 3, 3, 6, 6, 6], "with candidates it begins; a step ends at 6"
    assert not [name for name in artifact.read_tensors(checkpoint_file(*ENTRY))[0] if name.startswith("gradient/")]
    kept.save([t])
    tensors, about = artifact.read_tensors(checkpoint_file(*ENTRY))
    assert about["position"] == "8" and [name for name in tensors if name.startswith("gradient/")]
    again = trainer(parent_folder, config)
    kept.restore(again)
    assert again.position == 8
    assert_same(run(again), run(trainer(parent_folder, THREE)))


def parts_of(folder, count):
    return [trainer(folder, THREE, part=(number, count)) for number in range(count)]


@pytest.mark.parametrize("count", [2, 4])
def test_variants_that_are_split_over_trainers_have_the_same_bits(parent_folder, count):
    whole = run(trainer(parent_folder, THREE))
    found = {
        row.kind + row.variant: (row, state, curve)
        for t in parts_of(parent_folder, count)
        for row, state, curve in run(t).results()
    }
    assert len(found) == len(whole.results())
    for row, state, curve in whole.results():
        other, tensors, losses = found[row.kind + row.variant]
        assert other == row and losses == curve and all(torch.equal(tensors[k], v) for k, v in state.items())


@pytest.mark.parametrize("cuts", [(6, 9), (9, 6), (0, 8)], ids=str)
def test_one_trainer_goes_on_with_what_two_have_left_at_different_positions(parent_folder, cuts):
    """The variants that are further wait for the others; with nothing of a part, that one begins anew."""
    whole, halves = trainer(parent_folder, THREE), parts_of(parent_folder, 2)
    for half, cut in zip(halves, cuts, strict=True):
        hand_over(run(half, range(cut)), whole)
    assert whole.position == min(cuts) - 1
    assert [c.choice for c in run(whole).candidates] == list(whole.choices)
    assert_same(whole, run(trainer(parent_folder, THREE)))


def test_calibration_tokens_grow_with_the_width_of_the_parent():
    """So that each half of them has more tokens than the widest activation has features."""
    from small_models import tiny_config

    wide = tiny_config(hidden_size=64, intermediate_size=28_672)
    assert LibraryConfig().for_parent(tiny_config()).calibration_tokens == LEAST_CALIBRATION_TOKENS
    assert LibraryConfig().for_parent(wide).calibration_tokens // 2 >= 2 * 28_672
    assert LibraryConfig(calibration_tokens=5).for_parent(wide).calibration_tokens == 5
