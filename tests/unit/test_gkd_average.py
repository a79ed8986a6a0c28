"""Global distillation with a running average of the weights: what it is, that it is what is watched and published, and that it resumes."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from gkd_trainers import LONG, new_trainer, watched, weights

from puzzle_ray.config import RunConfig
from puzzle_ray.distill.averaging import POWER
from puzzle_ray.distill.gkd import train_to_end
from puzzle_ray.distill.settings import GkdConfig
from puzzle_ray.planning.distilling import worker_parts
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Store

AVERAGED = LONG.model_copy(update={"average_weights": True})


def train(trainer, tmp_path, name="gkd"):
    artifact = Store(str(tmp_path)).artifact("gkd", {"name": name}, {})
    train_to_end(trainer, artifact, Quiet())
    return artifact


def close(a, b):
    return all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_the_first_n_steps_count_n_to_the_power_together():
    trainer, total, seen = new_trainer(AVERAGED), 12, []
    for _ in range(total):
        trainer.step()
        seen.append(weights(trainer))
    shares = [((n + 1) ** POWER - n**POWER) / total**POWER for n in range(total)]
    expected = {name: sum(share * step[name] for share, step in zip(shares, seen, strict=True)) for name in seen[0]}
    assert sum(shares) == pytest.approx(1) and close(trainer.average.weights, expected)


def test_without_held_out_text_the_average_is_published(tmp_path):
    trainer = new_trainer(AVERAGED)
    train(trainer, tmp_path)
    assert trainer.total_steps == len(trainer.curve) == 40
    assert all(torch.equal(p, trainer.average.weights[name]) for name, p in trainer.parameters.items())


def test_the_rate_stays_at_its_peak_and_looking_changes_no_step(tmp_path):
    plain, seen = new_trainer(AVERAGED), watched(AVERAGED)
    train(plain, tmp_path, "plain")
    train(seen, tmp_path, "seen")
    assert {row.learning_rate for row in seen.curve[5:]} == {AVERAGED.learning_rate}
    assert [row.loss for row in plain.curve] == [row.loss for row in seen.curve]
    best = seen.guard.best_row
    assert best.step > 0
    seen.average.restart()
    assert seen.guard.measure()[0] == best.kl, "the child has the best average"


def test_what_is_watched_is_the_average():
    trainer = watched(AVERAGED)
    trainer.guard.look(0)
    for _ in range(5):
        trainer.step()
    own = weights(trainer)
    trainer.guard.look(5)
    assert all(torch.equal(p, own[name]) for name, p in trainer.parameters.items()), "the child is as it was"
    trainer.average.put()
    plain = watched(LONG)
    for name, p in plain.parameters.items():
        p.data.copy_(trainer.parameters[name])
    assert plain.guard.measure()[0] == trainer.guard.rows[-1].kl != trainer.guard.rows[0].kl


def test_training_goes_back_to_the_best_average_which_begins_anew():
    trainer = watched(AVERAGED)
    trainer.guard.look(0)
    for _ in range(5):
        trainer.step()
    trainer.guard.look(5)
    best = {name: value.clone() for name, value in trainer.average.weights.items()}
    for _ in range(5):
        trainer.step()
    there = dict(trainer.average.weights)
    trainer.go_back()
    assert trainer.next_step == 5
    for name, p in trainer.parameters.items():
        assert torch.equal(p, best[name]) and torch.equal(trainer.average.weights[name], best[name])
        assert trainer.average.weights[name] is there[name], "no second one: it is as large as the child"


@pytest.mark.parametrize(("rate", "cut"), [(1e-2, 7), (1.0, 4)])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, rate, cut):
    config = AVERAGED.model_copy(update={"learning_rate": rate})
    whole = watched(config)
    train(whole, tmp_path, "whole")

    class Cut(Exception):
        pass

    def advance(count=1, **facts):
        advance.steps += 1
        if advance.steps > cut:
            raise Cut

    from contextlib import nullcontext

    advance.steps = 0
    progress = SimpleNamespace(stage=lambda *_: nullcontext(SimpleNamespace(advance=advance)))
    artifact = Store(str(tmp_path)).artifact("gkd", {"name": "cut"}, {})
    with pytest.raises(Cut):
        train_to_end(watched(config), artifact, progress)
    second = watched(config)
    train_to_end(second, artifact, Quiet())
    assert [dataclasses.astuple(row) for row in second.guard.rows] == [dataclasses.astuple(row) for row in whole.guard.rows]
    assert all(torch.equal(p, second.parameters[name]) for name, p in whole.parameters.items())


def test_trials_of_a_range_test_measure_the_average_and_leave_all_as_it_was():
    trainer = watched(AVERAGED.model_copy(update={"learning_rate": "auto"}))
    trainer.guard.look(0)
    start = weights(trainer)
    trainer.choose_rate(SimpleNamespace(advance=lambda *_, **__: None))
    assert len(trainer.trials) > 1 and trainer.next_step == 0
    assert all(torch.equal(value, start[name]) for name, value in trainer.average.weights.items())
    assert all(torch.equal(p, start[name]) for name, p in trainer.parameters.items())
    assert trainer.learning_rate.at(trainer.total_steps - 1) == trainer.learning_rate.peak


def test_its_memory_is_planned_and_the_key_knows_it_only_where_it_is_asked_for():
    configs = [RunConfig(gkd={"average_weights": averaged}) for averaged in (False, True)]
    parts = [worker_parts(10, 10, "float32", config, new_trainer().child.config) for config in configs]
    assert parts[1] == parts[0] | {"average": 40}
    assert "average_weights" not in GkdConfig().identity() and AVERAGED.identity()["average_weights"] is True
