"""Blockwise local distillation: what it minimises, and that its state survives anything bit for bit."""

import errno
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from layer_trainers import CONFIG, SPACE, assert_same, changed, restored, rows_of, run, stream, trainer
from small_models import save_parent

from puzzle_ray.artifacts import LayerChoice, SearchSpace
from puzzle_ray.data.order import Tokens
from puzzle_ray.distill.library import LIBRARY_TABLE, build_serially, unfinished_layers
from puzzle_ray.distill.library_checkpoints import checkpoint_file
from puzzle_ray.distill.losses import normalised_mse
from puzzle_ray.distill.schedule import LearningRate, Schedule
from puzzle_ray.distill.text import LibraryText
from puzzle_ray.errors import NotFinite, OutOfOrder, ParentError, StoreError
from puzzle_ray.models.child import load_model, read_config
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space


def test_normalised_mse_is_zero_for_a_copy_and_one_for_zeros():
    y = torch.randn(2, 3, 4)
    assert normalised_mse(y, y) == 0 and normalised_mse(torch.zeros_like(y), y) == 1


def test_learning_rate_warms_up_then_falls_to_a_tenth():
    rates = [LearningRate.of_bld(1.0, 100, 0.1).at(step) for step in range(100)]
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
    rows = rows_of(run(trainer(parent_folder, changed(tokens=2048))))
    assert rows.keys() == {"attention/gqa:1", "attention/linear", "attention/noop", "ffn/ffn:24", "ffn/linear", "ffn/noop"}
    for name, row in rows.items():
        if name.endswith("noop"):
            assert row.start_loss == row.final_loss and row.kept == "start" and row.tokens == 0
        else:
            assert row.final_loss < row.start_loss and row.kept == "trained" and row.tokens == 2048


def test_the_parents_weights_are_not_touched(parent_folder):
    t = trainer(parent_folder)
    before = {k: v.clone() for k, v in t.layer.state_dict().items()}
    run(t)
    assert all(torch.equal(v, before[k]) for k, v in t.layer.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cut", [2, 3, 4, 7, 11])
def test_a_restored_trainer_ends_with_the_same_bits(parent_folder, cut, dtype):
    config = changed(compute_dtype=dtype)
    assert_same(run(trainer(parent_folder, config)), restored(parent_folder, cut, config=config))


def test_under_bfloat16_weights_moments_and_losses_stay_float32_and_training_works(parent_folder):
    full, half = (run(trainer(parent_folder, changed(tokens=2048, compute_dtype=d))) for d in ("float32", "bfloat16"))
    for candidate in half.candidates:
        assert {v.dtype for v in (*candidate.weights().values(), *candidate.start.values())} <= {torch.float32}
        for slots in candidate.optimizer.state.values() if candidate.optimizer else ():
            assert slots["exp_avg"].dtype == slots["exp_avg_sq"].dtype == torch.float32
    for (a, b), (name, row) in zip(zip(full.candidates, half.candidates, strict=True), rows_of(half).items(), strict=True):
        assert all(torch.equal(a.start[k], b.start[k]) for k in a.start), "calibration and starts are those of float32"
        exact = a.record
        assert row.start_loss != exact.start_loss or name.startswith("ffn/noop"), "the forward is not float32's"
        assert row.start_loss == pytest.approx(exact.start_loss, rel=0.02)
        assert row.final_loss == pytest.approx(exact.final_loss, rel=0.1)
        assert row.final_loss < row.start_loss or name.endswith("noop")


@pytest.mark.parametrize(
    "model_type", ["gpt2", "gemma2", *(pytest.param(name, marks=pytest.mark.wide) for name in ("opt", "granite"))]
)
def test_bfloat16_autocast_reaches_every_style_of_block(tmp_path, model_type):
    t = run(trainer(save_parent(tmp_path, model_type), changed(tokens=512, compute_dtype="bfloat16")))
    assert all(row.kept == "trained" or "noop" in name for name, row in rows_of(t).items())


def test_a_gap_is_refused(parent_folder):
    t = trainer(parent_folder)
    with pytest.raises(OutOfOrder, match="micro-batch 1 came, but 0 is the next"):
        t.step(*next(stream(t, [1])))


def test_a_parent_that_is_not_finite_is_named(parent_folder):
    t = trainer(parent_folder)
    x = torch.randn(2, 16, 32)
    with pytest.raises(NotFinite, match="layer 1, variant parent, micro-batch 0"):
        t.step(0, x, torch.full_like(x, float("nan")))


def test_activations_that_the_parents_float16_does_not_hold_are_told_at_once(tmp_path):
    """BLD computes in float32 and would not notice; children are saved in float16, and their logits would not be finite."""
    load_model(save_parent(tmp_path), torch.float16).save_pretrained(tmp_path)
    t, x = trainer(tmp_path), torch.randn(2, 16, 32)
    t.step(0, x, 1e4 * x)
    with pytest.raises(ParentError, match="behind layer 1 reach .*, and the parent's float16 ends at 65504; save it in bfloat16"):
        t.step(1, x, 1e5 * x)


def test_a_variant_that_diverges_is_reported_and_the_others_go_on(parent_folder):
    t = trainer(parent_folder)
    items = list(stream(t, range(t.schedule.positions)))
    start = t.schedule.calibrate + t.schedule.validate
    for item in items[:start]:
        t.step(*item)
    bad = next(c for c in t.candidates if c.choice == LayerChoice(ffn="ffn:24"))
    for item in items[start:]:
        if item[0] < start + 4:  # it goes back to its start three times
            assert bad.record.returns == item[0] - start and not bad.record.failure
            with torch.no_grad():
                next(bad.halves["ffn"].parameters()).fill_(float("nan"))
        t.step(*item)
    rows = rows_of(t)
    assert f"layer 1, variant ffn:24, micro-batch {start + 3}" in rows["ffn/ffn:24"].failure
    assert rows["ffn/ffn:24"].kept == "start" and rows["ffn/ffn:24"].returns == 3
    assert rows["attention/gqa:1"].failure == "" and rows["attention/gqa:1"].tokens == 256
    kept = {row.variant: state for row, state, _ in t.results() if row.kind == "ffn"}
    assert all(torch.isfinite(v).all() for v in kept["ffn:24"].values())


class Stop(Exception):
    pass


class Interrupting(Quiet):
    """Stops the stage after some micro-batches."""

    def __init__(self, after):
        self.after = after

    @contextmanager
    def stage(self, name, total, unit):
        yield self

    def advance(self, count=1, **facts):
        self.after -= count
        if self.after < 0:
            raise Stop


def assert_same_library(a, b):
    assert a.rows() == b.rows() and a.curves() == b.curves() and a.artifact.names() == b.artifact.names()
    for name in a.artifact.names():
        if name.endswith(".safetensors"):
            x, y = a.artifact.read_tensors(name)[0], b.artifact.read_tensors(name)[0]
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.fixture(scope="module")
def undisturbed(parent_folder, tmp_path_factory):
    """The space, the token stream and the library that come out when nothing happens on the way."""
    tokens = Tokens(np.random.default_rng(0).integers(0, 96, (64, 16), dtype=np.int32))
    space = search_space(read_config(parent_folder), *SPACE, 8)
    step = Store(str(tmp_path_factory.mktemp("whole"))).artifact("whole", {}, {})
    torch.set_num_threads(1)
    return space, tokens, build_serially(str(parent_folder), space, CONFIG, tokens, 0, step, Quiet())


VARIATIONS = {
    "plain": {},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "all terms, stopping": {
        "loss": {"block": 1, "subblock": 0.5, "cosine": 0.5},
        "early_stop": {"min_improvement": 0.5, "window": 1, "patience": 1},
    },
    "coupled": {},
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_an_interrupted_library_goes_on_and_equals_an_undisturbed_one(parent_folder, random_tokens, tmp_path, name):
    space, config, store = search_space(read_config(parent_folder), *SPACE, 8), changed(**VARIATIONS[name]), Store(str(tmp_path))
    if name == "coupled":
        space = SearchSpace(tuple(replace(layer, coupled=True) for layer in space.layers))
    whole = build_serially(str(parent_folder), space, config, random_tokens, 0, store.artifact("whole", {}, {}), Quiet())
    step = store.artifact("cut", {}, {})
    with pytest.raises(Stop):
        build_serially(str(parent_folder), space, config, random_tokens, 0, step, Interrupting(7))
    assert (
        step.exists(checkpoint_file(*next(iter(space.entries()))))
        and not step.finished
        and len(unfinished_layers(space, step)) == 3
    )
    cut = build_serially(str(parent_folder), space, config, random_tokens, 0, step, Quiet())
    assert_same_library(whole, cut)
    assert LIBRARY_TABLE in step.names() and step.names("checkpoints") == []


def test_it_is_said_how_often_the_text_is_read(parent_folder, undisturbed, tmp_path, capsys):
    """In this process as on a cluster, and before any micro-batch."""
    space, tokens, _ = undisturbed
    config = CONFIG.model_copy(update={"tokens": 8 * CONFIG.tokens})
    text = LibraryText.of(tokens, 0, config)
    step = Store(str(tmp_path)).artifact("library", {}, {})
    with pytest.raises(Stop):
        build_serially(str(parent_folder), space, config, tokens, 0, step, Interrupting(0))
    there = text.training.num_tokens
    words = f"  library: its text is read {text.epochs:.1f} times over: there are {there} tokens to train on\n"
    assert text.epochs > 1 and words in capsys.readouterr().err


@pytest.mark.parametrize("writes", [1, 50, 89, 95, 107, 108])
def test_a_full_disk_is_said_and_loses_nothing(parent_folder, undisturbed, tmp_path, monkeypatch, writes):
    """Whatever the write that finds no room (checkpoint, variant, table), the same command then goes on to the same bits."""
    from puzzle_ray.store import scratch

    space, tokens, whole = undisturbed
    step, write, done = Store(str(tmp_path)).artifact("cut", {}, {}), scratch.put, []

    def until_full(file, target):
        if ".written" in target.parts:  # what goes before every one of them
            return write(file, target)
        if len(done) == writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, target)
        done.append(target.name)

    with monkeypatch.context() as full:
        full.setattr(scratch, "put", until_full)
        with pytest.raises(StoreError, match="No space left on device.*free some space, then run the same command"):
            build_serially(str(parent_folder), space, CONFIG, tokens, 0, step, Quiet())
    assert not step.finished and len(done) == writes
    kept = {path: path.read_bytes() for path in tmp_path.glob("cut-*/layer_*.safetensors")}
    again = build_serially(str(parent_folder), space, CONFIG, tokens, 0, step, Quiet())
    assert_same_library(whole, again)
    assert all(path.read_bytes() == data for path, data in kept.items())


def test_a_variant_that_is_not_finite_before_training_is_named_and_the_others_go_on(parent_folder):
    """A start can be bad too: it is found at validation, and a variant that cannot be trained is named as well."""
    t = trainer(parent_folder)
    run(t, range(t.schedule.calibrate))
    bad = next(c for c in t.candidates if c.choice == LayerChoice(attention="linear"))
    with torch.no_grad():
        next(bad.halves["attention"].parameters()).fill_(float("inf"))
    run(t)
    rows = rows_of(t)
    position = t.schedule.calibrate
    assert (
        f"the validation loss is not finite at layer 1, variant linear, micro-batch {position}"
        in rows["attention/linear"].failure
    )
    assert [name for name, row in rows.items() if row.failure] == ["attention/linear"] and rows["attention/linear"].tokens == 0
    assert rows["attention/gqa:1"].kept == "trained"
