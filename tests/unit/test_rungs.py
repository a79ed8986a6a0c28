"""Rungs of global distillation: who goes on, and a climb with pauses that ends in the bits of one without."""

import dataclasses
from types import SimpleNamespace

import pytest
from gkd_jobs import gkd_jobs

from actors.distil_sweep import Rows
from puzzle_ray.config import load
from puzzle_ray.distill import rungs
from puzzle_ray.distill.gkd import CHECKPOINT, CHILD, CURVE, LOOKS, distill_child
from puzzle_ray.distill.rungs import Climber, RungRow, climb, goes_on
from puzzle_ray.distill.settings import GkdConfig, rung_steps
from puzzle_ray.errors import ConfigError
from puzzle_ray.models.child import load_model
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Store

CONFIG = GkdConfig(tokens=27 * 32, micro_batch_tokens=32, learning_rate=1e-3, checkpoint_every=10, heldout_looks=9)


def climber(name, *asked, scenario=()):
    job = SimpleNamespace(artifact=SimpleNamespace(key=name))
    return Climber(job, name, asked, scenario, {})


def test_each_rung_has_three_times_the_steps_of_the_one_below_at_a_look():
    assert rung_steps(90, 1, 3) == [10, 30, 90]
    assert rung_steps(100, 10, 3) == [20, 40, 100]
    assert rung_steps(7, 7, 4) == [7], "fewer rungs where there are not so many looks"
    assert rung_steps(90, 1, 1) == [90]


def test_who_is_beaten_by_none_goes_on():
    slow, fast = climber("slow", 3.0), climber("fast", 1.0)
    assert goes_on(slow, 0.1, [(fast, 0.5)]), "its KL is lower"
    assert goes_on(fast, 0.5, [(slow, 0.1)]), "it spends less"
    assert not goes_on(slow, 0.6, [(fast, 0.5)])


def test_who_is_beaten_goes_on_among_the_best_third():
    children = [(climber(str(n), 1.0), 0.1 * n) for n in range(6)]
    late = climber("late", 1.0)
    assert goes_on(late, 0.05, children[:6]), "second of seven"
    assert goes_on(late, 0.15, children) and not goes_on(late, 0.25, children), "third, and fourth of seven"
    assert goes_on(late, 9.0, []), "who comes first goes on"


def test_children_of_other_scenarios_are_not_compared():
    at_8, at_16 = climber("a", 1.0, scenario=(8.0,)), climber("b", 1.0, scenario=(16.0,))
    assert goes_on(at_8, 0.9, [(at_16, 0.1)] * 5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A child distilled without a pause, and the job of the same child elsewhere."""
    first, second = (gkd_jobs(tmp_path_factory.mktemp(name), CONFIG)[0] for name in ("whole", "climbed"))
    distill_child(first, Quiet())
    return first, second


def content(job):
    state = load_model(job.artifact.local_folder(CHILD)).state_dict()
    return {name: value.tolist() for name, value in state.items()}, job.artifact.read(CURVE), job.artifact.read(LOOKS)


def test_a_climb_that_is_broken_off_twice_ends_in_the_bits_of_one_run(whole, monkeypatch):
    undisturbed, job = whole
    first = next(climb(job, 3, Quiet()))
    assert (first.rung, first.step, first.tokens) == (1, 3, 96) and job.artifact.exists(CHECKPOINT)
    steps = []
    train = rungs.train_until

    def counted(trainer, *more):
        before = trainer.next_step
        train(trainer, *more)
        steps.append((before, trainer.next_step))

    monkeypatch.setattr(rungs, "train_until", counted)
    second = next(row for row in climb(job, 3, Quiet(), known=[first]) if row.rung == 2)
    rows = list(climb(job, 3, Quiet(), known=[first, second]))
    assert steps == [(3, 9), (9, 27)], "every step once"
    assert [(row.rung, row.step) for row in rows] == [(1, 3), (2, 9), (3, 27)]
    assert content(job) == content(undisturbed) and job.artifact.facts() == undisturbed.artifact.facts()
    assert rows[-1].kl == job.artifact.facts()["heldout_kl"] < first.kl
    assert list(climb(job, 3, Quiet())) == list(climb(undisturbed, 3, Quiet())) == rows, "a finished child has its rows, too"


def test_decisions_are_kept_and_made_once(tmp_path):
    artifact = Store(str(tmp_path)).artifact("sweep", {}, {})
    children = [climber("slow", 3.0), climber("fast", 1.0)]
    rows = Rows.read(children, artifact)
    assert rows.decided("fast", RungRow(1, 9, 90, 0.5))
    assert not rows.decided("slow", RungRow(1, 9, 90, 0.7))
    again = Rows.read(children, artifact)
    assert again.of == rows.of and [row.goes_on for row in again.of["slow"]] == [False]
    assert not again.decided("slow", RungRow(1, 9, 90, 0.1)), "what was decided stays"
    assert again.of == rows.of and dataclasses.astuple(again.of["fast"][0]) == (1, 9, 90, 0.5, True, False)


def test_who_comes_to_the_last_rung_is_not_turned_down(tmp_path):
    rows = Rows.read([climber("slow", 3.0), climber("fast", 1.0)], Store(str(tmp_path)).artifact("sweep", {}, {}))
    assert rows.decided("fast", RungRow(1, 27, 270, 0.5, is_last=True))
    assert rows.decided("slow", RungRow(1, 27, 270, 0.7, is_last=True)), "it is distilled to its end"


def test_rungs_need_whole_children():
    settings = ("gkd.parallel=fsdp", "search.sweep_gkd=true", "search.sweep_rungs=2")
    with pytest.raises(ConfigError, match="set search.sweep_rungs to 1, or gkd.parallel to ddp"):
        load("tiny", None, settings)
