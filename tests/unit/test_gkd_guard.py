"""Global distillation never makes a child worse on held-out text."""

import dataclasses

import pytest
import torch
from gkd_trainers import LONG, heldout, new_trainer, watched, weights

from puzzle_ray.distill.gkd import train_to_end
from puzzle_ray.distill.guard import MAX_RETURNS
from puzzle_ray.distill.summary import gkd_summary
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Store


def train(trainer, tmp_path, name="gkd"):
    artifact = Store(str(tmp_path)).artifact("gkd", {"name": name}, {})
    train_to_end(trainer, artifact, Quiet())
    return artifact


def test_the_best_weights_are_kept(tmp_path):
    trainer = watched()
    train(trainer, tmp_path)
    guard = trainer.guard
    assert [row.step for row in guard.rows] == list(range(0, 41, 5)) and not guard.num_returns
    assert guard.best_row.kl < guard.rows[0].kl
    assert guard.measure()[0] == guard.best_row.kl == min(row.kl for row in guard.rows), (
        "the child has the weights of its best look"
    )
    assert trainer.guard.facts()["kept"] == f"step {guard.best_row.step}"
    assert not any(value.requires_grad for value in guard.best.values()), "copies, without the graph of what they are copies of"
    before = dict(guard.best)
    guard.rows.clear()
    assert guard.look(0) and all(guard.best[name] is value for name, value in before.items()), "filled again, not made again"


def test_watching_changes_nothing_where_all_goes_well(tmp_path):
    plain, seen = new_trainer(LONG), watched()
    train(plain, tmp_path, "plain")
    train(seen, tmp_path, "seen")
    assert seen.guard.best_row.step == 40
    assert [row.loss for row in plain.curve] == [row.loss for row in seen.curve]
    assert all(torch.equal(p, seen.parameters[name]) for name, p in plain.parameters.items())


@pytest.mark.parametrize("rate", [30.0, 1e30])
def test_an_absurd_learning_rate_ends_well_with_the_starts_weights(tmp_path, rate):
    trainer = watched(LONG.model_copy(update={"learning_rate": rate, "warmup_fraction": 0.0}))
    start = weights(trainer)
    train(trainer, tmp_path)
    facts = trainer.guard.facts()
    assert facts["kept"] == "start" and facts["returns"] == MAX_RETURNS + 1
    assert all(torch.equal(p, start[name]) for name, p in trainer.parameters.items())
    line = gkd_summary(facts)
    assert "did not improve the child" in line and "published as it was" in line and "lower gkd.learning_rate" in line


def test_a_loss_that_is_no_number_is_not_called_a_rise(tmp_path):
    trainer = watched(LONG.model_copy(update={"kl_weight": 1e39}))
    train(trainer, tmp_path)
    facts = trainer.guard.facts() | {"steps": 40, "ended_after": trainer.next_step}
    assert facts["not_finite"] == facts["returns"] == MAX_RETURNS + 1
    line = gkd_summary(facts)
    assert "loss, gradient or KL was not finite 4 times" in line and "rose" not in line
    assert "no step was taken" in line and "gkd.learning_rate" not in line
    assert "4 times, each but the last with half the learning rate after it; it ended after step" in line
    assert "rose above the start's 1 time and loss" in gkd_summary(facts | {"returns": 2, "not_finite": 1})


def test_a_child_whose_kl_is_no_number_is_the_worst_of_all():
    """NaN would be below everything that it is compared with: rungs and rivals take the least."""
    trainer = watched()
    with torch.no_grad():
        trainer.child.model.norm.weight.fill_(torch.nan)
    trainer.guard.look(0)
    assert trainer.guard.rows[0].kl == trainer.guard.facts()["heldout_kl"] == float("inf")


def test_training_goes_back_to_the_best_and_on_with_half_the_rate(tmp_path):
    trainer = watched()
    measured = iter([1.0, 0.8, 5.0, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    at_best = {}

    def measure():
        kl = next(measured)
        if kl == 0.8:
            at_best.update(weights(trainer))
        return kl, kl

    trainer.guard.measure = measure
    back, moments = trainer.go_back, [slots["exp_avg"] for slots in trainer.optimizer.state.values()]

    def seen():
        back()
        now = [slots["exp_avg"] for slots in trainer.optimizer.state.values()]
        assert all(a is b for a, b in zip(now, moments, strict=True)), "no second set of them: they are as large as the child"
        assert trainer.next_step == 5 and all(torch.equal(p, at_best[name]) for name, p in trainer.parameters.items())
        assert all(not slots["exp_avg"].any() for slots in trainer.optimizer.state.values())

    trainer.go_back = seen
    train(trainer, tmp_path)
    assert [(row.step, row.kl, row.rate_factor, row.returned) for row in trainer.guard.rows][:4] == [
        (0, 1.0, 1.0, 0), (5, 0.8, 1.0, 0), (10, 5.0, 1.0, 1), (10, 0.7, 0.5, 0),
    ]  # fmt: skip
    halved = new_trainer(LONG)
    assert trainer.curve[5].learning_rate == 0.5 * halved.learning_rate.at(5)


@pytest.mark.parametrize(
    ("steps", "looks", "kls", "returned"),
    [
        (20, 10, [1.0, 3.0, 2.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2], []),  # steps 2 and 4 settle
        (20, 10, [1.0, 3.0, 2.0, 1.1, 5.0, 2.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2], [6]),  # the optimizer then begins anew
        (3, 10, [1.0, 3.0, 2.0, 1.1, 1.2, 1.1, 0.9], [3]),  # at the end every rise counts
        (3, 10, [1.0, 3.0, float("inf"), 3.0, 2.0, 0.9], [2]),  # and what is no number at once
    ],
)
def test_a_rise_in_the_first_steps_counts_only_at_the_end(tmp_path, steps, looks, kls, returned):
    trainer = watched(LONG.model_copy(update={"tokens": steps * 64, "heldout_looks": looks}))
    measured = iter(kls)
    trainer.guard.measure = lambda: (next(measured), 0.0)
    train(trainer, tmp_path)
    assert [row.step for row in trainer.guard.rows if row.returned] == returned
    assert trainer.next_step == steps and not list(measured)
    assert trainer.guard.best_row.kl == min(kls)


@pytest.mark.parametrize(
    ("rate", "cut", "looks"), [(1e-2, 7, 8), (1.0, 4, 8), (1.0, 9, 8), (1.0, 3, 40), (1.0, 8, 40), (0.03, 5, 40)]
)
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, rate, cut, looks):
    """Cut anywhere, also between a return and the next checkpoint, and among first steps whose rises do not count yet."""
    config = LONG.model_copy(update={"learning_rate": rate, "heldout_looks": looks, "checkpoint_every": 2 if looks == 40 else 3})
    whole = watched(config)
    train(whole, tmp_path, "whole")

    class Cut(Exception):
        pass

    class After(Quiet):
        steps = 0

        def stage(self, name, total, unit):
            from contextlib import nullcontext

            return nullcontext(self)

        def advance(self, count=1, **facts):
            self.steps += 1
            if self.steps > cut:
                raise Cut

    artifact = Store(str(tmp_path)).artifact("gkd", {"name": "cut"}, {})
    with pytest.raises(Cut):
        train_to_end(watched(config), artifact, After())
    second = watched(config)
    train_to_end(second, artifact, Quiet())
    assert [dataclasses.astuple(row) for row in second.guard.rows] == [dataclasses.astuple(row) for row in whole.guard.rows]
    assert all(torch.equal(p, second.parameters[name]) for name, p in whole.parameters.items())


def test_all_processes_decide_as_rank_0_does():
    config = LONG.model_copy(update={"num_workers": 2})
    trainer = new_trainer(config, ranks=[1], all_reduce=lambda shared: shared.add_(torch.tensor([0.25, 0.5], dtype=shared.dtype)))
    trainer.watch(heldout())
    assert trainer.guard.measure() == (0.25, 0.5), "what this process measured does not count"
