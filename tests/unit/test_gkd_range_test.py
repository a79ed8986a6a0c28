"""Global distillation may choose its learning rate itself."""

import dataclasses
import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from gkd_trainers import CONFIG, heldout, new_trainer, summing_over_two, watched, weights

from puzzle_ray.distill.gkd import train_to_end
from puzzle_ray.distill.range_test import FIRST, MOST_TRIALS, RATES, Trial, best_rate, range_test, trial_facts, trial_steps
from puzzle_ray.distill.settings import GkdConfig
from puzzle_ray.distill.summary import gkd_summary
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Store

AUTO = GkdConfig.model_validate(
    CONFIG.model_dump(exclude_unset=True) | {"tokens": 20 * 64, "learning_rate": "auto", "heldout_looks": 4}
)


@pytest.mark.parametrize("best", range(len(RATES)))
def test_the_best_rate_of_a_curve_with_one_valley_is_found(best):
    trials = range_test(lambda rate: Trial(rate, abs(RATES.index(rate) - best), 5), math.inf)
    assert best_rate(trials) == RATES[best]
    assert len(trials) == len({trial.rate for trial in trials}) <= abs(best - FIRST) + 3


def test_no_test_takes_more_trials_than_a_plan_counts():
    """Of all orders of the first rate's KL, its neighbour's above and the start's, with KLs that fall or rise on both sides."""
    most = 0
    for above, below, start in itertools.product((-1, 1, math.inf), (-1, 1, math.inf), (0.5, 100.0, math.inf)):
        kl = [50 + (below if n < FIRST else above) * abs(n - FIRST) for n in range(len(RATES))]
        kl[FIRST] = 50.0
        most = max(most, len(range_test(lambda rate, kl=kl: Trial(rate, kl[RATES.index(rate)], 5), start)))
    assert most == MOST_TRIALS


@pytest.mark.parametrize("finite", [0, 3, FIRST])
def test_rates_that_diverge_are_left_behind(finite):
    trials = range_test(lambda rate: Trial(rate, 1 / rate if RATES.index(rate) <= finite else math.inf, 5), math.inf)
    assert best_rate(trials) == RATES[finite]
    assert [fact["kl"] for fact in trial_facts(trials) if fact["rate"] > RATES[finite]] == [None] * sum(
        t.rate > RATES[finite] for t in trials
    )


def test_where_every_rate_diverges_the_lowest_is_taken():
    assert best_rate(range_test(lambda rate: Trial(rate, math.inf, 5), 1.0)) == RATES[0]


def test_the_largest_rate_close_to_the_best_is_taken_and_a_first_rate_that_harms_is_not_raised():
    kl = dict(zip(RATES, (9.0, 9.0, 0.23, 0.2, 0.206, 0.31, 1.1, 9.0, 9.0, 9.0), strict=True))
    trials = range_test(lambda rate: Trial(rate, kl[rate], 20), start_kl=0.3)
    assert [trial.rate for trial in trials] == [3e-4, 1e-4, 3e-5, 1e-5] and best_rate(trials) == 1e-4
    assert range_test(lambda rate: Trial(rate, kl[rate], 20), start_kl=0.4)[1].rate == 1e-3


def test_a_trial_is_a_small_part_of_training_and_never_more_than_it():
    assert [trial_steps(n) for n in (3, 60, 400, 1000, 10_000)] == [3, 20, 20, 50, 100]


def test_trials_leave_the_child_as_it_was_and_the_best_rate_is_taken(tmp_path):
    trainer, tried = watched(AUTO), {}
    start, measure = weights(trainer), trainer.guard.measure
    trainer.guard.look(0)
    assert trainer.needs_rate

    def measured():
        tried[trainer.learning_rate.peak] = measure()[0]
        return measure()

    trainer.guard.measure = measured

    class Bar:
        def advance(self, count=1, **facts):
            assert count == 0, "the trials are no steps of training"

    trainer.choose_rate(Bar())
    assert {trial.rate: trial.kl for trial in trainer.trials} == tried and len(tried) >= 2
    assert trainer.learning_rate.peak == best_rate(trainer.trials) and trainer.learning_rate.total_steps == 20
    assert all(torch.equal(p, start[name]) for name, p in trainer.parameters.items()) and not trainer.curve
    assert len(trainer.guard.rows) == 1 and not trainer.needs_rate
    again = watched(AUTO)
    train_to_end(again, Store(str(tmp_path)).artifact("gkd", {}, {}), Quiet())
    assert again.trials == trainer.trials
    chosen = watched(AUTO.model_copy(update={"learning_rate": trainer.learning_rate.peak}))
    train_to_end(chosen, Store(str(tmp_path)).artifact("gkd", {"chosen": 1}, {}), Quiet())
    assert chosen.curve == again.curve, "as if that rate had been set"
    facts = again.guard.facts() | {"learning_rate": again.learning_rate.peak, "range_test": trial_facts(again.trials)}
    assert f"learning rate {again.learning_rate.peak:g}, the best of {len(tried)} in a range test" in gkd_summary(facts)


def test_a_resumed_run_does_not_repeat_the_trials_and_ends_in_the_same_bits(tmp_path, monkeypatch):
    whole = watched(AUTO)
    train_to_end(whole, Store(str(tmp_path)).artifact("gkd", {}, {}), Quiet())

    class Cut(Exception):
        pass

    class Cutting(Quiet):
        def stage(self, name, total, unit):
            from contextlib import nullcontext

            return nullcontext(self)

        def advance(self, count=1, **facts):
            if count and facts:
                raise Cut

    artifact = Store(str(tmp_path)).artifact("gkd", {"cut": 1}, {})
    with pytest.raises(Cut):
        train_to_end(watched(AUTO), artifact, Cutting())
    monkeypatch.setattr("puzzle_ray.distill.gkd_trainer.range_test", None)
    second = watched(AUTO)
    train_to_end(second, artifact, Quiet())
    assert second.trials == whole.trials and second.curve == whole.curve
    assert [dataclasses.astuple(row) for row in second.guard.rows] == [dataclasses.astuple(row) for row in whole.guard.rows]
    assert all(torch.equal(p, second.parameters[name]) for name, p in whole.parameters.items())


def test_one_process_chooses_as_two_do(tmp_path):
    config = AUTO.model_copy(update={"num_workers": 2, "tokens": 6 * 128})
    tensors, barrier, artifact = {}, threading.Barrier(2), Store(str(tmp_path)).artifact("gkd", {}, {})
    two = [new_trainer(config, ranks=[r], all_reduce=summing_over_two(r, tensors, barrier)) for r in range(2)]
    alone = new_trainer(config)
    for trainer in (*two, alone):
        trainer.watch(heldout())
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda trainer: train_to_end(trainer, artifact, Quiet(), writes=False), two))
    train_to_end(alone, artifact, Quiet())
    for trainer in two:
        assert trainer.trials == alone.trials and trainer.curve == alone.curve
        assert all(torch.equal(p, alone.parameters[name]) for name, p in trainer.parameters.items())
