"""Coupled distillation: whole pairs in training, in the library, in scores and in children."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from layer_trainers import CONFIG, SPACE, assert_same, changed, hand_over, restored, rows_of, run, stream, trainer
from torch.nn import functional as F

from puzzle_ray.artifacts import BLOCK, PARENT, LayerChoice, SearchSpace
from puzzle_ray.distill.bld import Schedule
from puzzle_ray.distill.library import Library, build_serially, library_summary, starting_library, unfinished_layers, variant_file
from puzzle_ray.distill.losses import normalised_mse
from puzzle_ray.distill.realize import realize
from puzzle_ray.errors import ConfigError
from puzzle_ray.evaluation.child_meter import ChildMeter
from puzzle_ray.models.blocks import load_stack, swapped
from puzzle_ray.models.child import load_model, read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.progress import Quiet
from puzzle_ray.scoring.serial import score_serially
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.store import RECORD, Store
from puzzle_ray.variants.space import search_space

PAIR = LayerChoice("gqa:1", "ffn:24")


def coupled(folder, names=SPACE) -> SearchSpace:
    space = search_space(read_config(folder), *names, 8)
    return SearchSpace(tuple(replace(layer, coupled=True) for layer in space.layers))


def pair_trainer(folder, config=CONFIG, names=SPACE):
    return trainer(folder, config, layer_space=coupled(folder, names).layers[1])


def of(t, choice):
    return next(c for c in t.candidates if c.choice == choice)


def test_every_pair_is_trained_and_both_halves_of_it_move(parent_folder):
    t = run(pair_trainer(parent_folder, changed(tokens=2048)))
    rows = rows_of(t)
    assert len(rows) == 4 * 4 - 1 and {name.split("/")[0] for name in rows} == {BLOCK}
    for name, row in rows.items():
        halves = name.removeprefix("block/").split(" + ")
        if set(halves) <= {"noop", PARENT}:
            assert row.kept == "start" and row.tokens == 0
        else:
            assert row.final_loss < row.start_loss and row.kept == "trained" and row.tokens == 2048, name
    c = of(t, PAIR)
    moved = {key.split("/")[0] for key, value in c.weights().items() if not torch.equal(value, c.start[key])}
    assert moved == {"attention", "ffn"}


def test_a_pair_starts_from_the_starts_of_its_halves_and_one_beside_the_parent_is_the_decoupled_variant(parent_folder):
    pairs, halves = run(pair_trainer(parent_folder)), run(trainer(parent_folder))
    a, f = of(halves, LayerChoice(attention="gqa:1")), of(halves, LayerChoice(ffn="ffn:24"))
    start = of(pairs, PAIR).start
    assert start.keys() == (a.start | f.start).keys()
    assert all(torch.equal(start[k], v) for k, v in (a.start | f.start).items())
    for single in (a, f):
        same = of(pairs, single.choice)
        assert same.record == single.record
        assert all(torch.equal(v, single.weights()[k]) for k, v in same.weights().items())
    assert any(not torch.equal(v, a.weights()[k]) for k, v in of(pairs, PAIR).weights().items() if k in a.weights())


def test_training_together_beats_putting_trained_halves_together(parent_folder):
    """On the block's output, which is what it is for."""
    config = changed(tokens=4096)
    pairs, halves = run(pair_trainer(parent_folder, config)), run(trainer(parent_folder, config))
    a, f = of(halves, LayerChoice(attention="gqa:1")), of(halves, LayerChoice(ffn="ffn:24"))
    composed, losses = of(pair_trainer_like(parent_folder, pairs), PAIR), []
    composed._load(a.weights() | f.weights())
    for _, x, y in stream(pairs, range(2, 4)):  # the validation micro-batches
        with torch.no_grad():
            middle = pairs.stack.run_layer(composed.halves["attention"], 1, x)
            losses.append(float(normalised_mse(pairs.stack.run_layer(composed.halves["ffn"], 1, middle), y)))
    assert of(pairs, PAIR).record.final_loss < np.mean(losses) < of(pairs, PAIR).record.start_loss


def pair_trainer_like(folder, t):
    other = pair_trainer(folder, t.config)
    hand_over(t, other)
    return other


@pytest.mark.parametrize("cut", [2, 3, 4, 7, 11])
def test_a_restored_trainer_of_pairs_ends_with_the_same_bits(parent_folder, cut):
    space = coupled(parent_folder).layers[1]
    assert_same(run(pair_trainer(parent_folder)), restored(parent_folder, cut, layer_space=space))


def test_a_pair_that_diverges_is_named_and_the_others_go_on(parent_folder):
    t = pair_trainer(parent_folder)
    start = t.schedule.calibrate + t.schedule.validate
    run(t, range(start))
    for position in range(start, start + 4):
        with torch.no_grad():
            next(of(t, PAIR).halves["ffn"].parameters()).fill_(float("nan"))
        run(t, [position])
    run(t)
    rows = rows_of(t)
    failed = rows.pop(f"block/{PAIR.label}")
    assert f"layer 1, variant gqa:1 + ffn:24, micro-batch {start + 3}" in failed.failure and failed.kept == "start"
    assert not any(row.failure for row in rows.values())
    kept = next(state for row, state, _ in t.results() if row.variant == PAIR.label)
    assert all(torch.isfinite(v).all() for v in kept.values())


@pytest.fixture(scope="module")
def library(parent_folder, tmp_path_factory):
    from puzzle_ray.data.order import Tokens

    tokens = Tokens(np.random.default_rng(0).integers(0, 96, (64, 16), dtype=np.int32))
    space = coupled(parent_folder, (("gqa:1", "noop"), ("ffn:24", "noop")))
    step = Store(str(tmp_path_factory.mktemp("store"))).artifact("library", {}, {})
    return build_serially(str(parent_folder), space, CONFIG, tokens, 0, step, Quiet()), space, tokens


def test_a_pairs_weights_are_its_own(library, parent_folder):
    found, space, tokens = library
    assert found.coupled and Library(found.artifact).coupled and unfinished_layers(space, found.artifact) == []
    pair, single = found.states(1, PAIR), found.states(1, LayerChoice(attention="gqa:1"))
    assert pair.keys() == {"attention", "ffn"} and single.keys() == {"attention"}
    assert pair["attention"].keys() == single["attention"].keys()
    assert any(not torch.equal(pair["attention"][k], v) for k, v in single["attention"].items())
    assert found.states(1, LayerChoice()) == {} and found.states(1, LayerChoice("noop", "noop")) == {"attention": {}, "ffn": {}}
    assert found.artifact.exists("layer_001.block.gqa-1+ffn-24.safetensors")
    assert variant_file(1, BLOCK, PAIR.label) == "layer_001.block.gqa-1+ffn-24.safetensors"
    facts = found.artifact.facts()
    assert facts["coupled"] and facts["variants"] == 3 * 8 and library_summary(facts).startswith("24 pairs, ")


def test_rows_say_what_the_weights_in_the_files_do(library, parent_folder):
    """The loss in the table, computed again from the published weights on the stream's validation micro-batches."""
    found, _, tokens = library
    config, index = read_config(parent_folder), 1
    stack = load_stack(parent_folder, describe(config), config, 0, 2, torch.float32)
    row = next(row for row in found.rows() if (row.layer, row.variant) == (index, PAIR.label))
    layer = swapped(stack.layer(index), PAIR, stack.descriptor, config, found.states(index, PAIR))
    losses = []
    for number in range(Schedule.of(CONFIG).validate):
        with torch.no_grad():
            x = stack.run_layer(stack.layer(0), 0, stack.embed(tokens.batch(0, number, 2)))
            losses.append(float(normalised_mse(stack.run_layer(layer, index, x), stack.run_layer(stack.layer(index), index, x))))
    assert row.kept == "trained" and row.final_loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_scores_and_children_are_made_of_exactly_these_pairs(library, parent_folder, tmp_path):
    """A block score is the KL of the child that has this one pair; a child of pairs has the KL that the meter says."""
    found, space, tokens = library
    config = read_config(parent_folder)
    stack = load_stack(parent_folder, describe(config), config, 0, 3, torch.float32)
    scoring = ScoringConfig(granularity="block", tokens=64, micro_batch_tokens=32)
    texts, store = tokens.first(64, 2), Store(str(tmp_path))
    scores = score_serially(stack, texts, space, scoring, store.artifact("scores", {}, {}), found.states, Quiet())
    assert {(r.layer, r.attention, r.ffn) for r in scores.rows} == {
        (i, *vars(c).values()) for i in range(3) for c in space.layers[i].trained
    }
    parent = load_model(parent_folder)
    children = {
        "one": (LayerChoice(), PAIR, LayerChoice()),
        "all": (PAIR, LayerChoice("noop", "ffn:24"), LayerChoice("gqa:1", "noop")),
    }
    for name, choices in children.items():
        step = store.artifact("child", {"name": name}, {})
        realize(str(parent_folder), choices, found.artifact, step)
        with torch.inference_mode():
            ids = torch.cat(texts)
            p, q = (F.log_softmax(m(ids).logits.double(), dim=-1) for m in (parent, load_model(step.path("child"))))
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        assert ChildMeter(stack, found, texts).measure(choices).kl == pytest.approx(kl, rel=1e-4)
        if name == "one":
            assert scores.value(1, PAIR, "kl") == pytest.approx(kl, rel=1e-4)


@pytest.fixture(scope="module")
def halves(parent_folder, library, tmp_path_factory):
    """A decoupled library of the same space, in a store."""
    space = SearchSpace(tuple(replace(layer, coupled=False) for layer in library[1].layers))
    step = Store(str(tmp_path_factory.mktemp("halves"))).artifact("library", {}, {"parent": "this one"})
    return build_serially(str(parent_folder), space, CONFIG, library[2], 0, step, Quiet())


def test_pairs_may_start_from_halves_that_are_trained_already(library, halves, parent_folder, tmp_path):
    """What a pair starts from is then the decoupled library's own weights; so a single half's start loss is its final one there."""
    fresh, space, tokens = library
    config = changed(start_from=halves.artifact.url)
    step = Store(str(tmp_path)).artifact("library", {}, {})
    found = build_serially(str(parent_folder), space, config, tokens, 0, step, Quiet())
    before = {(row.layer, row.kind, row.variant): row for row in halves.rows()}
    own = {(row.layer, row.variant): row for row in fresh.rows()}
    for row in found.rows():
        assert row.initialisation == "trained halves"
        choice = LayerChoice(*row.variant.split(" + "))
        if len(choice.replaced) == 1:
            half = before[row.layer, choice.replaced[0], choice.variant(choice.replaced[0])]
            assert row.start_loss == (half.final_loss if half.kept == "trained" else half.start_loss)
        elif choice == PAIR:
            assert row.start_loss < own[row.layer, row.variant].start_loss


def test_a_start_that_does_not_fit_is_refused(library, halves, tmp_path):
    fresh, space, _ = library
    with pytest.raises(ConfigError, match="holds coupled pairs"):
        starting_library(changed(start_from=fresh.artifact.url), space)
    with pytest.raises(ConfigError, match="was made for another parent; name a library of this one"):
        starting_library(changed(start_from=halves.artifact.url), space, "another one")
    old = Store(str(tmp_path)).artifact("library", {}, {})
    old.finish({"variants": 12, "trained": 9, "failures": []})
    with pytest.raises(ConfigError, match="was made by an older version; train it again"):
        starting_library(changed(start_from=old.url), space)
    record = Path(old.path(RECORD))
    record.write_text(json.dumps(json.loads(record.read_text()) | {"schema": 2}))
    with pytest.raises(ConfigError, match=r"was written by an older version \(schema 2, this one reads \d+\); train it again"):
        starting_library(changed(start_from=old.url), space)
    wide = SearchSpace(tuple(replace(layer, ffn=(*layer.ffn, "linear")) for layer in space.layers))
    with pytest.raises(ConfigError, match="has no linear for layer 0; narrow the space, or name another"):
        starting_library(changed(start_from=halves.artifact.url), wide)
    assert starting_library(changed(start_from=halves.artifact.url), space, "this one").artifact.url == halves.artifact.url
    assert starting_library(CONFIG, space) is None
