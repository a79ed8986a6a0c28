"""`library.learning_rate: auto`: variants find their rates by trials, and then train as if the rate had been set."""

import json
import math

import pytest
import torch
from layer_trainers import CONFIG, assert_same, changed, restored, run, trainer
from small_models import save_parent, tiny_config

from puzzle_ray.config import RunConfig
from puzzle_ray.data.order import Tokens
from puzzle_ray.distill import bld, candidate, rate_trials, schedule
from puzzle_ray.distill.library import TRIALS_TABLE, build_serially, library_summary
from puzzle_ray.distill.rate_trials import RATES, RateTrial, best_rate, judged, trial_steps
from puzzle_ray.distill.schedule import LearningRate, Schedule
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.models.child import read_config
from puzzle_ray.planning.demand import Sizes, works
from puzzle_ray.progress import Quiet
from puzzle_ray.rows import rows_from_parquet
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

AUTO = changed(learning_rate="auto", validation_tokens=32, calibration_tokens=32)


@pytest.fixture(scope="module")
def tried(parent_folder):
    return run(trainer(parent_folder, AUTO))


def entries(t):
    return [(row.kind, row.variant) for row, _, _ in t.results()]


def test_training_is_what_it_is_with_the_rate_that_was_found(parent_folder, tried):
    found = {entry: next(x.rate for x in tried.tried(*entry) if x.taken) for entry in entries(tried) if tried.tried(*entry)}
    assert len(found) == 4, "all but the no-ops"
    for rate in set(found.values()):
        fixed = run(trainer(parent_folder, AUTO.model_copy(update={"learning_rate": rate})))
        assert not any(fixed.tried(*entry) for entry in entries(fixed))
        for ours, theirs in zip(tried.results(), fixed.results(), strict=True):
            if found.get((ours[0].kind, ours[0].variant), rate) == rate:
                assert ours[0] == theirs[0] and ours[2] == theirs[2]
                assert all(torch.equal(ours[1][name], theirs[1][name]) for name in theirs[1])


def test_a_trial_is_a_short_training_at_its_rate_and_the_largest_of_the_best_is_taken(parent_folder, tried, monkeypatch):
    steps = tried.schedule.trial_steps
    assert steps == 8 == tried.schedule.steps
    for entry in entries(tried):
        trials = tried.tried(*entry)
        if trials:
            assert [t.rate for t in trials] == list(RATES) and {t.steps for t in trials} == {steps}
            near = [t.rate for t in trials if t.loss <= 1.05 * min(x.loss for x in trials)]
            assert [t.rate for t in trials if t.taken] == [max(near)]
            assert len({t.loss for t in trials}) == len(RATES)
    monkeypatch.setattr(
        LearningRate, "of_bld", classmethod(lambda cls, p, n, w, own=LearningRate.of_bld: own(p, n, rate_trials.WARMUP))
    )
    alone = run(trainer(parent_folder, AUTO.model_copy(update={"learning_rate": RATES[1]})))
    for row, _, curve in alone.results():
        trials = tried.tried(row.kind, row.variant)
        if trials:
            assert trials[1].loss == judged(curve) == math.fsum(curve[-2:]) / 2, "the same text from the same start"


@pytest.mark.parametrize("cut", [3, 9, 10, 11, 18, 42, 43])
def test_one_that_is_killed_among_its_trials_ends_in_the_same_bits(parent_folder, tried, cut):
    second = restored(parent_folder, cut, config=AUTO)
    assert_same(tried, second)
    assert all(tried.tried(*entry) == second.tried(*entry) for entry in entries(tried))


def test_one_that_is_killed_within_an_accumulated_step_of_a_trial_ends_in_the_same_bits(parent_folder):
    config = AUTO.model_copy(update={"gradient_accumulation": 2})
    whole = run(trainer(parent_folder, config))
    assert whole.schedule.trial_steps == 4 and whole.schedule.trials == 40
    assert_same(whole, restored(parent_folder, 5, config=config))


def test_every_trial_reads_the_first_micro_batches_of_training():
    tried, fixed = Schedule.of(AUTO), Schedule.of(AUTO.model_copy(update={"learning_rate": 1e-3}))
    before, trials = tried.calibrate + tried.validate, len(RATES) * tried.trial_steps
    assert tried.positions == fixed.positions + trials == fixed.positions + tried.trials
    numbers = [tried.data_number(n) for n in range(tried.positions)]
    assert numbers[:before] + numbers[before + trials :] == [fixed.data_number(n) for n in range(fixed.positions)]
    assert numbers[before : before + trials] == numbers[before + trials :][: tried.trial_steps] * len(RATES)
    assert {tried.phase(n)[0] for n in range(before, before + trials)} == {"try"}
    assert [trial_steps(n) for n in (3, 100, 488, 10_000)] == [3, 8, 24, 100]


def test_rates_that_break_a_variant_are_never_taken(parent_folder, monkeypatch):
    assert best_rate([3.0, 2.0, None, 2.2, None]) == RATES[1] and best_rate([None] * 5) == RATES[0]
    assert best_rate([3.0, 2.1, 2.0, 2.05, None]) == RATES[3]
    assert judged([1.0, None, 1.0]) is None and judged([9.0, 9.0, 9.0, 1.0]) == 1.0
    for module in (bld, candidate, schedule, rate_trials):
        monkeypatch.setattr(module, "RATES", (1e30, 1e-3))
    ended = run(trainer(parent_folder, AUTO))
    trials = [ended.tried(*entry) for entry in entries(ended) if ended.tried(*entry)]
    assert all(broken.loss is None and not broken.taken and good.taken for broken, good in trials)
    assert not any(row.failure for row, _, _ in ended.results())


@pytest.mark.parametrize("given", [0, -1, "fast", True, math.inf])
def test_a_rate_is_a_number_or_auto(given):
    with pytest.raises(ValueError, match="write a number above 0, or auto"):
        LibraryConfig(learning_rate=given)
    assert LibraryConfig(learning_rate="1e-4").learning_rate == 1e-4
    assert LibraryConfig().identity()["learning_rate"] == 1e-3 and LibraryConfig(learning_rate=1e-3) == LibraryConfig()


def test_a_library_has_its_trials_in_a_table_and_one_with_a_set_rate_has_none(tmp_path):
    folder = save_parent(tmp_path / "parent", num_hidden_layers=1)
    space = search_space(read_config(folder), ("gqa:1", "noop"), ("ffn:24",), 8)
    tokens = Tokens(torch.randint(96, (40, 16), generator=torch.Generator().manual_seed(0)).int().numpy())
    for config in (AUTO, CONFIG):
        artifact = Store(str(tmp_path)).artifact("library", config.identity(), {})
        build_serially(str(folder), space, config, tokens, 0, artifact, Quiet())
        found = "learning_rates" in artifact.facts()
        assert found == artifact.exists(TRIALS_TABLE) == (config is AUTO)
        assert ("learning rates: " in library_summary(artifact.facts())) == found
        for name in artifact.names():
            if name.startswith("layer_"):
                about = artifact.read_tensors(name)[1]
                assert ("trials" in about) == (found and "noop" not in name)
                assert "taken" not in json.loads(about["row"])
        if found:
            rows, _ = rows_from_parquet(artifact.read(TRIALS_TABLE), RateTrial)
            assert {(row.kind, row.variant) for row in rows} == {("attention", "gqa:1"), ("ffn", "ffn:24")}
            assert len(rows) == 2 * len(RATES) and sum(artifact.facts()["learning_rates"].values()) == 2


def test_a_plan_counts_the_trials():
    config = tiny_config()
    sizes = Sizes(config, search_space(config, ("noop",), ("ffn:24",), 8))
    flops = []
    for rate in (1e-3, "auto"):
        library = {"tokens": 204_800, "micro_batch_tokens": 2048, "learning_rate": rate}
        found = {w.stage: w for w in works(RunConfig(library=library), config, sizes)}
        flops.append(found["library"].flops)
    assert flops[1] == pytest.approx(flops[0] * (1 + len(RATES) * 8 / 100))
