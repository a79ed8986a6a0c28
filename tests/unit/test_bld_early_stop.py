"""The early stop: a function of a variant's own loss curve, and what it leaves behind."""

import math

import pytest
import torch
from layer_trainers import assert_same, changed, restored, rows_of, run, stream, trainer

from puzzle_ray.config import load
from puzzle_ray.distill.library import build_serially, library_summary
from puzzle_ray.distill.schedule import LearningRate, is_flat
from puzzle_ray.distill.settings import EarlyStop, LibraryConfig
from puzzle_ray.errors import ConfigError
from puzzle_ray.models.child import read_config
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

RULE = EarlyStop(min_improvement=0.1, window=4, patience=2)


def ends_at(losses, rule=RULE):
    """How many micro-batches a curve lives."""
    return next((n for n in range(1, len(losses) + 1) if is_flat(losses[:n], rule)), None)


def test_a_curve_that_keeps_falling_never_ends_and_a_constant_one_ends_after_its_patience():
    assert ends_at([0.9 ** (n / 4) for n in range(100)], EarlyStop(min_improvement=0.05, window=4, patience=2)) is None
    assert ends_at([1.0] * 100) == 12  # a window to compare with, and two without improvement
    assert ends_at([1.0] * 100, EarlyStop(window=5, patience=1)) == 10


def test_the_improvement_asked_for_is_relative_and_counts_against_the_best_before():
    steps = [1.0] * 4 + [0.95] * 4 + [0.91] * 4  # 9 % in two windows
    assert ends_at(steps + [0.89] * 4) == 12
    assert ends_at(steps, EarlyStop(min_improvement=0.08, window=4, patience=2)) is None
    assert ends_at([v / 1000 for v in steps]) == 12
    risen = [1.0] * 4 + [0.5] * 4 + [2.0] * 4 + [0.7] * 4 + [0.1] * 4
    assert ends_at(risen) == 16, "after a rise, falling back to above the best is no improvement"


def test_noise_within_a_window_does_not_count():
    noisy = [0.9 ** (n / 4) * (1.4 if n % 2 else 0.6) for n in range(80)]
    assert ends_at(noisy, EarlyStop(min_improvement=0.05, window=4, patience=2)) is None
    assert ends_at(noisy, EarlyStop(min_improvement=0.05, window=1, patience=1)) == 2


STOPPING = changed(tokens=64 * 32, early_stop={"min_improvement": 0.05, "window": 6, "patience": 2})


def test_a_stopped_variant_keeps_the_weights_of_its_stop_and_the_others_go_on(parent_folder):
    t = trainer(parent_folder, STOPPING)
    at_stop, last = {}, {}
    for position, x, y in stream(t, range(t.schedule.positions)):
        t.step(position, x, y)
        for c in t.candidates:
            last[c.choice] = c.weights()
            if c.record.stopped:
                at_stop.setdefault(c.choice, (len(c.record.curve), c.weights()))
    free = run(trainer(parent_folder, STOPPING.model_copy(update={"early_stop": None})))
    warmup = LearningRate.of_bld(1.0, 64, STOPPING.warmup_fraction).warmup_steps
    lengths = {c.choice: len(c.record.curve) for c in t.candidates if c.optimizer}
    stopped = {choice for choice, length in lengths.items() if length < 64}
    assert stopped == set(at_stop) and len(stopped) > 0
    assert len(set(lengths.values())) > 1, "each variant has an end of its own"
    for a, b in zip(t.candidates, free.candidates, strict=True):
        n = len(a.record.curve)
        assert a.record.curve == b.record.curve[:n], "until then nothing is different"
        if a.choice in stopped:
            assert at_stop[a.choice][0] == n and (n - warmup) % 6 == 0 and n >= warmup + 18
            assert all(torch.equal(v, last[a.choice][k]) for k, v in at_stop[a.choice][1].items())
            assert not a.optimizer.state, "its moments are forgotten"
    for (kind, variant), row in ((name.split("/"), row) for name, row in rows_of(t).items()):
        length = next((n for choice, n in lengths.items() if t.space.entry(choice) == (kind, variant)), 0)
        assert row.tokens == length * 32 and row.tokens_saved == ((64 - length) * 32 if length else 0)
        assert math.isfinite(row.final_loss) and (row.kept == "trained") == (row.final_loss < row.start_loss)


def test_nothing_is_trained_when_all_have_stopped_and_no_loss_is_reported(parent_folder):
    config = changed(tokens=40 * 32, warmup_fraction=0, early_stop={"min_improvement": 1, "window": 1, "patience": 1})
    t = trainer(parent_folder, config)
    losses = [t.step(*item) for item in stream(t, range(t.schedule.positions))]
    first = t.schedule.calibrate + t.schedule.validate
    assert [n for n, loss in enumerate(losses) if loss is not None] == [
        first,
        first + 1,
        first + 2,
    ]  # a warm-up step, two windows
    assert {row.tokens for name, row in rows_of(t).items() if "noop" not in name} == {3 * 32}


@pytest.mark.parametrize("cut", [10, 40, 60])
def test_a_trainer_restored_before_or_after_a_stop_ends_with_the_same_bits(parent_folder, cut):
    assert_same(run(trainer(parent_folder, STOPPING)), restored(parent_folder, cut, config=STOPPING))


def test_by_default_nothing_stops(parent_folder):
    assert LibraryConfig().early_stop is None
    t = run(trainer(parent_folder, changed(tokens=64 * 32, learning_rate=1e-12)))  # as flat as can be
    assert {row.tokens for name, row in rows_of(t).items() if "noop" not in name} == {64 * 32}
    assert {row.tokens_saved for row in rows_of(t).values()} == {0}


def test_tables_facts_and_the_printed_line_say_what_was_spared(parent_folder, random_tokens, tmp_path):
    space = search_space(read_config(parent_folder), ("gqa:1", "noop"), ("ffn:24",), 8)
    found = {}
    for name, stop in (("whole", None), ("stopped", {"min_improvement": 0.5, "window": 4, "patience": 1})):
        step = Store(str(tmp_path)).artifact("library", {"by": name}, {})
        config = changed(tokens=64 * 32, early_stop=stop)
        found[name] = build_serially(str(parent_folder), space, config, random_tokens, 0, step, Quiet())
    facts = found["stopped"].artifact.facts()
    rows = found["stopped"].rows()
    curves = found["stopped"].curves()
    assert all(len(curves[row.layer, row.kind, row.variant]) * 32 == row.tokens for row in rows)
    assert facts["tokens_saved"] == sum(row.tokens_saved for row in rows) > 0
    assert facts["tokens"] + facts["tokens_saved"] == 6 * 64 * 32  # two trainable variants of three layers
    assert facts["stopped_early"] == sum(row.tokens_saved > 0 for row in rows)
    share = facts["tokens_saved"] / (6 * 64 * 32)
    assert f"{facts['stopped_early']} stopped early, which spared {share:.0%} of the training tokens" in library_summary(facts)
    assert "stopped" not in library_summary(found["whole"].artifact.facts()) and "9 variants" in library_summary(facts)


def test_settings_that_make_no_sense_are_refused():
    assert load(None, None, ("library.early_stop={}",)).library.early_stop == EarlyStop()
    with pytest.raises(ConfigError, match="library.early_stop.min_improvement: .* greater than 0"):
        load(None, None, ("library.early_stop.min_improvement=0",))
    with pytest.raises(ConfigError, match="library.early_stop.windows: unknown setting"):
        load(None, None, ("library.early_stop.windows=3",))
