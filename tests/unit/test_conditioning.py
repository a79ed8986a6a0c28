"""How well-conditioned variants are, and block distillation that goes back where the loss rises."""

import math

import pytest
import torch
from layer_trainers import assert_same, changed, restored, rows_of, run, trainer

from puzzle_ray.artifacts import LayerSpace
from puzzle_ray.distill.bld import LibraryRow
from puzzle_ray.distill.conditioning import CHANGE, changed_inputs, largest_singular_value, own_product, sensitivity
from puzzle_ray.distill.library import library_summary
from puzzle_ray.distill.outliers import stands_out
from puzzle_ray.distill.schedule import RISE, has_risen


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shapes", [[(5, 9)], [(40, 40)], [(8, 30), (30, 12)]])
def test_the_largest_singular_value_of_a_matrix_or_a_product(shapes):
    factors = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    product = factors[0] if len(factors) == 1 else factors[0] @ factors[1]
    exact = float(torch.linalg.matrix_norm(product, 2))
    assert exact * 0.99 <= largest_singular_value(factors) <= exact * (1 + 1e-5)


def test_of_zeros_it_is_zero_and_of_what_is_not_finite_infinite():
    assert largest_singular_value([torch.zeros(3, 4)]) == 0
    assert largest_singular_value([torch.full((3, 4), float("nan"))]) == math.inf


def test_the_sensitivity_of_a_linear_block_is_that_of_the_change_alone_whatever_its_error():
    x, weight, offset = random(1, 64, 16), random(16, 16, seed=1), random(16, seed=2)
    inputs, target = [x, *changed_inputs(x, 0)], x @ random(16, 16, seed=3)
    for change in (inputs[1] - x, inputs[2] - x):
        assert torch.allclose(change.norm(dim=-1), CHANGE * x.norm(dim=-1), rtol=1e-3)
    found = sensitivity([(hidden.double() @ weight.double()) + offset for hidden in inputs], target)
    moved = ((inputs[1].double() - x) @ weight.double()).square().sum() / target.double().square().sum()
    assert found == pytest.approx(float(moved), rel=1e-2)
    assert sensitivity([x * 0, x * 0, x * float("nan")], target) == math.inf


def test_every_row_has_the_norms_and_the_sensitivity_of_the_weights_that_are_kept(parent_folder):
    t = run(trainer(parent_folder, changed(learning_rate=1e-2)))
    kept = {row.kind + "/" + row.variant: state for row, state, _ in t.results()}
    rows = rows_of(t)
    own = largest_singular_value(own_product(t.layer, "attention", t.stack.descriptor))
    linear = next(iter(kept["attention/linear"][name] for name in kept["attention/linear"] if "linear_attn" in name))
    assert rows["attention/linear"].parent_singular_value == own
    assert rows["attention/linear"].singular_value == largest_singular_value([linear])
    assert rows["attention/noop"].singular_value == 0 < rows["attention/noop"].sensitivity
    assert len({row.parent_sensitivity for row in rows.values()}) == 1
    for row in rows.values():
        assert 0 < row.sensitivity < 25 * row.parent_sensitivity and not stands_out(row)


def test_what_is_kept_is_what_was_measured_where_the_start_is_kept(parent_folder):
    """Trained with a rate that does nothing, and trained to something worse: both keep the start."""
    still = rows_of(run(trainer(parent_folder, changed(learning_rate=1e-30))))
    wild = run(trainer(parent_folder, changed(learning_rate=1e6)))
    assert {row.kept for row in rows_of(wild).values()} == {"start"}
    for name, row in rows_of(wild).items():
        assert (row.sensitivity, row.singular_value) == (still[name].sensitivity, still[name].singular_value)


def test_huge_entries_that_cancel_stand_out_and_the_line_of_the_library_warns():
    usual = LibraryRow(0, "attention", "linear", "", 0.1, 0.1, "start", 1, "", singular_value=0.4, parent_singular_value=0.39,
                       sensitivity=2e-6, parent_sensitivity=1e-6)  # fmt: skip
    assert stands_out(usual) == ""
    huge = LibraryRow(**{**usual.__dict__, "singular_value": 46.7, "sensitivity": 1e-2})
    assert stands_out(huge) == "largest singular value 46.7, the parent's 0.39; sensitivity 0.01, the parent's 1e-06"
    facts = {"variants": 2, "trained": 0, "coupled": False, "stopped_early": 0, "went_back": 0, "failures": []}
    line = library_summary(facts | {"standing_out": [f"layer 0 attention linear: {stands_out(huge)}"]})
    assert "warning: 1 is less well-conditioned than the parent (layer 0 attention linear: largest singular value 46.7" in line
    assert "warning" not in library_summary(facts | {"standing_out": []})


def test_a_rise_is_looked_for_in_whole_windows_of_an_attempt():
    flat, up = [1.0] * 4, [1.01 * RISE] * 4
    assert not has_risen([], 0, 4, 1.0) and not has_risen(flat, 0, 4, 1.0) and has_risen(flat, 0, 4, 0.6)
    assert has_risen(flat + up, 0, 4, 1.0) and not has_risen(flat + up[:3], 0, 4, 1.0) and not has_risen(flat * 2, 0, 4, 1.0)
    assert not has_risen(flat + up, 5, 4, 1.0) and has_risen(flat + up + up, 8, 4, 1.0)


@pytest.mark.parametrize("coupled", [False, True])
def test_variants_whose_loss_rises_go_back_to_their_start_and_end_no_worse(parent_folder, coupled):
    space = LayerSpace(("parent", "gqa:1"), ("parent", "ffn:24"), coupled=coupled)
    t = run(trainer(parent_folder, changed(tokens=64 * 32, learning_rate=3.0, warmup_fraction=0.0), layer_space=space))
    rows = rows_of(t)
    assert rows and all(row.returns for row in rows.values()), "the rate is far too high"
    for row in rows.values():
        assert row.kept == "trained" or "the loss rose above its start" in row.failure or row.final_loss >= row.start_loss
        assert row.kept == "start" or row.final_loss < row.start_loss
    rate = t.learning_rate.at(t.schedule.train - 1)
    last = {c.choice: c.optimizer.param_groups[0]["lr"] for c in t.candidates if not c.record.failure}
    assert all(lr == rate * 0.5 ** t_of(t, choice).returns for choice, lr in last.items())


def t_of(t, choice):
    return next(c.record for c in t.candidates if c.choice == choice)


@pytest.mark.parametrize("cut", [8, 13, 30])
def test_a_trainer_restored_around_a_return_ends_with_the_same_bits(parent_folder, cut):
    config = changed(tokens=64 * 32, learning_rate=1.0, warmup_fraction=0.0)
    whole = run(trainer(parent_folder, config))
    assert any(row.returns for row in rows_of(whole).values())
    assert_same(whole, restored(parent_folder, cut, config=config))


def test_where_nothing_rises_nothing_is_different(parent_folder, monkeypatch):
    t = run(trainer(parent_folder))
    monkeypatch.setattr("puzzle_ray.distill.bld.has_risen", lambda *_: False)
    assert_same(t, run(trainer(parent_folder)))
    assert not any(row.returns for row in rows_of(t).values())
