"""Picking by measurement: the meter against whole models, the pick against a known truth, local search, interactions."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from picking_problem import LAYERS, LIMITS, PROFILE, SCENARIO, SCORES, SPACE, TABLES, Meter, cost, true_kl
from search_problems import random_problem
from torch.nn import functional as F

from jobs.search_architecture import candidates
from puzzle_ray.artifacts import LayerChoice, Measured
from puzzle_ray.distill.library import build_serially
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.errors import Infeasible
from puzzle_ray.evaluation.child_meter import ChildMeter
from puzzle_ray.models.blocks import load_stack
from puzzle_ray.models.child import assemble, load_model, read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.progress import Quiet
from puzzle_ray.search.interactions import measure_interactions
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.local_search import describe_exchanges, neighbouring_choices
from puzzle_ray.search.pick import PickOptions, pick, pick_as_configured, prediction_error
from puzzle_ray.search.searcher import Options
from puzzle_ray.search.settings import SearchConfig
from puzzle_ray.search.setup import SearchSetup
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space


def run(**how):
    meter = Meter()
    architecture, report = pick(TABLES, LIMITS, PickOptions(**how), Options(), meter)
    return architecture, report, meter


def test_the_candidate_of_least_measured_kl_is_picked():
    architecture, report, _ = run(count=6, min_different_layers=1, rivals=("greedy", "depth", "uniform"))
    assert [row["origin"] for row in report["candidates"]][:2] == ["mip", "mip #2"]
    assert true_kl(architecture.choices) == min(row["kl"] for row in report["candidates"]) == report["picked"]["kl"]
    assert architecture.predicted.runtime_ms <= 20.0
    assert report["prediction"]["mean_predicted_over_measured"] <= 1.0


def test_local_search_never_ends_worse_and_stays_within_the_budget():
    start, _, _ = run()
    found, report, meter = run(steps=20)
    every = [c for c in itertools.product(SPACE.layers[0].choices, repeat=LAYERS) if cost(c) <= 20.0]
    best = min(map(true_kl, every))
    assert best <= true_kl(found.choices) <= true_kl(start.choices)
    assert all(cost(choices) <= 20.0 for choices in meter.asked)
    assert len(meter.asked) == len(set(meter.asked)), "a child is measured once"
    assert cost(found.choices) == found.predicted.runtime_ms
    accepted = [row["kl"] for row in report["local_search"] if row["accepted"]]
    assert accepted == sorted(accepted, reverse=True)


def test_the_status_says_whether_the_pick_is_what_was_proven():
    """The bound is still that of the whole search, so a pick off the optimum shows a gap."""
    first, _, _ = run()
    assert (first.status, first.searcher) == ("optimal", "mip")
    found, _, _ = run(count=8, steps=10)
    if found.choices == first.choices:
        assert found.status == "optimal"
    else:
        assert found.status == "measured" and found.bound == first.bound < found.objective


def test_a_rival_without_an_answer_is_left_out_with_its_reason():
    tight = Limits(latency_ms=0.5)
    _, report = pick(TABLES, tight, PickOptions(rivals=("greedy", "max_params")), Options(), Meter())
    assert set(report["left_out"]) <= {"greedy", "max_params"}
    with pytest.raises(Infeasible):
        pick(TABLES, Limits(memory_mib=1e-9), PickOptions(), Options(), Meter())


@pytest.mark.parametrize("seed", range(3))
def test_swaps_are_the_single_and_double_exchanges_within_the_limits(seed):
    problem = random_problem(seed, 4, 3, 2, 0.6)
    start = np.array([c for c in itertools.product(range(3), repeat=4) if not problem.violated(np.array(c))][0])
    found = [tuple(int(v) for v in c) for c in neighbouring_choices(problem, start)]
    near = [c for c in itertools.product(range(3), repeat=4) if 1 <= (np.array(c) != start).sum() <= 2]
    assert len(found) == len(set(found)) and set(found) == {c for c in near if not problem.violated(np.array(c))}
    for count in (1, 2):
        objectives = [problem.objective(np.array(c)) for c in found if (np.array(c) != start).sum() == count]
        assert objectives == pytest.approx(sorted(objectives))


def test_interactions_are_the_pairs_less_their_parts():
    """Of layers 1 and 2 without attention, only the pair does the extra damage."""
    dropped, parent = LayerChoice("noop"), LayerChoice()
    picked = (parent, dropped, dropped, parent, parent)
    (row,) = measure_interactions([picked], picked, 2, Meter())
    assert row["interaction"] == pytest.approx(5.0) and row["a"].startswith("layer 1") and row["b"].startswith("layer 2")
    assert measure_interactions([picked], picked, 0, Meter()) == []


def test_as_configured_no_child_is_measured_for_a_picture_alone():
    """The children are the candidates; asked for pairs, the pick is the same, and blocks alone and in pairs are measured besides."""
    setup = SearchSetup(SPACE, SCORES, PROFILE, SCENARIO, "kl", "mip", 60.0, LIMITS, 0)
    plain, meter = SearchConfig(limits=LIMITS, candidates=3), Meter()
    picked, report = pick_as_configured(setup, plain, meter)
    assert len(meter.asked) == len(report["candidates"]) <= plain.most_candidates and report["interactions"] == []
    assert "search.interaction_blocks=4" in candidates(report)
    drawn, more = plain.model_copy(update={"interaction_blocks": 4}), Meter()
    same, report = pick_as_configured(setup, drawn, more)
    assert same.choices == picked.choices and len(meter.asked) < len(more.asked) <= len(meter.asked) + 10
    assert report["interactions"] and "interaction_blocks" not in candidates(report)
    assert drawn.identity() == plain.identity() | {"interaction_blocks": 4}


def test_two_blocks_of_one_layer_do_not_interact():
    """No child has both, so there is nothing to measure."""
    picked, parent = LayerChoice("noop"), LayerChoice()
    others = [(LayerChoice("gqa:1"), picked, parent), (LayerChoice(ffn="noop"), picked, parent)]
    rows = measure_interactions(others, (picked, picked, parent), 4, Meter())
    assert [(row["a"], row["b"]) for row in rows] == [
        (f"layer 0: {choice.label}", "layer 1: noop + parent")
        for choice in (LayerChoice("gqa:1"), picked, LayerChoice(ffn="noop"))
    ]


def test_prediction_says_how_far_the_sums_were_off():
    assert prediction_error([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == {
        "mean_predicted_over_measured": 0.5,
        "rank_correlation": pytest.approx(1.0),
    }
    assert prediction_error([1.0], [0.0]) == {"mean_predicted_over_measured": None, "rank_correlation": None}


def test_equal_predictions_share_a_rank_and_a_kl_that_is_no_number_has_none():
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 over the square root of 4.5 times 5."""
    predicted, measured = [1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]
    for other in (predicted, predicted[::-1]):
        found = prediction_error(other, measured if other is predicted else measured[::-1])
        assert found["rank_correlation"] == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert prediction_error([*predicted, 9.0], [*measured, math.nan]) == prediction_error(predicted, measured)
    assert prediction_error([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])["rank_correlation"] is None


def test_a_child_whose_kl_is_no_number_is_never_picked():
    """Of the search's answers, the first one is: NaN compares with nothing, so it would stay the least."""

    class Broken(Meter):
        def __call__(self, children):
            found = super().__call__(children)
            return [replace(m, kl=math.nan) if c == first.choices else m for c, m in zip(children, found, strict=True)]

    first, _, _ = run()
    picked, report = pick(TABLES, LIMITS, PickOptions(count=3), Options(), Broken())
    assert math.isnan(report["candidates"][0]["kl"]) and picked.choices != first.choices
    assert report["picked"]["kl"] == min(row["kl"] for row in report["candidates"][1:])
    picked, _ = pick(TABLES, LIMITS, PickOptions(count=3), Options(), Meter(), lambda c: [math.nan, 2.0, 1.0][: len(c)])
    assert [choice.label for choice in picked.choices] == report["candidates"][2]["choices"]


def test_a_searcher_that_needs_what_is_left_out_leaves_that_answer_out():
    _, report = pick(TABLES, Limits(latency_ms=35.0), PickOptions(searcher="depth", without=("noop",)), Options(), Meter())
    assert "needs noop" in report["left_out"]["depth without noop"]


def test_exchanges_are_named():
    parent = LayerChoice()
    assert describe_exchanges((parent, parent), (parent, LayerChoice("noop"))) == ["layer 1: parent + parent -> noop + parent"]


@pytest.fixture(scope="module")
def trained(parent_folder, tmp_path_factory):
    """A parent's stack, a library of its blocks, and batches."""
    from puzzle_ray.data.order import Tokens

    tokens = Tokens(np.random.default_rng(0).integers(0, 96, (64, 16), dtype=np.int32))
    config = read_config(parent_folder)
    space = search_space(config, ("parent", "gqa:1", "noop"), ("parent", "ffn:24", "noop"), 8)
    library = LibraryConfig(tokens=256, calibration_tokens=64, validation_tokens=64, micro_batch_tokens=64)
    step = Store(str(tmp_path_factory.mktemp("store"))).artifact("library", {}, {})
    found = build_serially(str(parent_folder), space, library, tokens, 0, step, Quiet())
    stack = load_stack(parent_folder, describe(config), config, 0, config.num_hidden_layers, torch.float32)
    return stack, found, tokens.first(64, 2), space


def test_the_meter_measures_what_the_assembled_child_says(trained, parent_folder):
    stack, library, batches, space = trained
    choices = (LayerChoice("gqa:1", "ffn:24"), LayerChoice("noop", "parent"), LayerChoice("parent", "noop"))
    states = {(i, kind): s for i, c in enumerate(choices) for kind, s in library.states(i, c).items()}
    child = assemble(parent_folder, read_config(parent_folder), choices, states, torch.float32)
    parent = load_model(parent_folder)
    found = ChildMeter(stack, library, batches).measure(choices)
    ids = torch.cat(batches)
    with torch.inference_mode():
        p, q = (F.log_softmax(m(ids, use_cache=False).logits.double(), dim=-1) for m in (parent, child))
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.tokens == ids.numel() and 0 < found.stderr < found.kl


def test_what_a_meter_kept_of_the_child_before_changes_nothing(trained):
    """Children in any order, with common beginnings, give bitwise what a new meter gives."""
    stack, library, batches, space = trained
    rng = np.random.default_rng(0)
    children = [tuple(layer.choices[rng.integers(len(layer.choices))] for layer in space.layers) for _ in range(12)]
    children = [child for first in children for child in (first, (*first[:2], LayerChoice()))]
    meter = ChildMeter(stack, library, batches)
    used = [meter.measure(child) for child in children]
    assert used == [ChildMeter(stack, library, batches).measure(child) for child in children]
    parent = meter.measure((LayerChoice(),) * 3)
    assert replace(parent, tokens=0) == Measured(0.0, 0.0, 0.0, 1.0, 0)


def test_rivals_are_measured_only_where_the_sum_of_scores_is_far_off():
    """Just below the factor by which the least KL is above its prediction they are measured, just above it they are not."""
    own, report, _ = run(count=2)
    off = report["picked"]["kl"] / report["picked"]["predicted"]
    assert off > 0 and true_kl(own.choices) == report["picked"]["kl"]
    names = ("greedy", "depth", "uniform", "max_params")
    every, _, all_asked = run(count=2, rivals=names)
    asked, report, meter = run(count=2, rivals=names, rivals_from=off * 0.999)
    assert asked.choices == every.choices and meter.asked == all_asked.asked
    spared, report, meter = run(count=2, rivals=names, rivals_from=off * 1.001)
    assert spared.choices == own.choices and len(meter.asked) == 2
    assert set(report["left_out"]) == set(names) and all("times its prediction" in why for why in report["left_out"].values())


def test_answers_without_a_variant_have_none_of_it_and_are_the_best_such():
    _, report, meter = run(count=1, without=("gqa",))
    assert [row["origin"] for row in report["candidates"]] == ["mip", "mip without gqa"]
    own = meter.asked[1]
    assert all(choice.attention != "gqa:1" for choice in own) and cost(own) <= 20.0
    space = [c for c in SPACE.layers[0].choices if c.attention != "gqa:1"]
    score = lambda choices: sum(SCORES.value(layer, choice, "kl") for layer, choice in enumerate(choices))  # noqa: E731
    every = [c for c in itertools.product(space, repeat=LAYERS) if cost(c) <= 20.0]
    assert score(own) == pytest.approx(min(map(score, every)))
    _, report, _ = run(count=1, without=("noop",))
    assert "mip without noop" in report["left_out"], "all that is left is too slow"


def test_what_distils_best_is_picked_whatever_it_was_before():
    """Distilled, the worst candidate is made the best: it is the pick, and the report says both of its KLs."""
    plain, before, _ = run(count=4, steps=1)
    worst = max(before["candidates"], key=lambda row: row["kl"])
    asked = []

    def distilled(children):
        asked.extend(children)
        return [0.1 if [c.label for c in choices] == worst["choices"] else 1.0 for choices in children]

    found, report = pick(TABLES, LIMITS, PickOptions(count=4, steps=1), Options(), Meter(), distilled)
    assert [choice.label for choice in found.choices] == worst["choices"] == report["picked"]["choices"]
    assert (report["picked"]["kl"], report["picked"]["kl_distilled"]) == (worst["kl"], 0.1)
    assert {row["kl_distilled"] for row in report["candidates"]} == {0.1, 1.0} and len(asked) == len(set(asked)) >= 4
    assert plain.choices in asked, "what the local search found is distilled, too"


class RaceOf:
    """A race that the child of these choices wins, against those that were asked for with it."""

    def __init__(self, wins):
        self.wins, self.asked = wins, []

    def __call__(self, children):
        self.asked += children
        won = [self.wins(choices) for choices in children]
        assert sum(won) == 1
        return [[{"rung": 1, "step": 3, "tokens": 96, "kl": 0.5, "goes_on": w}] for w in won]


def race(wins, **how):
    racing = RaceOf(wins)
    found, report = pick(TABLES, LIMITS, PickOptions(**how), Options(), Meter(), race=racing)
    return found, report, racing


def test_who_wins_the_race_is_picked_whatever_it_was_before():
    _, before, _ = run(count=4, steps=1)
    worst = max(before["candidates"], key=lambda row: row["kl"])
    found, report, racing = race(lambda c: [x.label for x in c] == worst["choices"], count=4, steps=1, race_own=5)
    assert [choice.label for choice in found.choices] == worst["choices"] == report["picked"]["choices"]
    assert len(set(racing.asked)) == len(racing.asked) == len(report["race"]) >= 4
    assert [true_kl(c) for c in racing.asked] == sorted(map(true_kl, racing.asked))
    assert [row["rungs"][0]["goes_on"] for row in report["race"]].count(True) == 1
    assert found.status == "measured" and "race" not in before and "kl_distilled" not in report["picked"]


def test_of_the_searchers_own_answers_the_best_races_and_those_that_a_rival_gives_too():
    rivals = ("greedy", "depth", "uniform", "max_params")
    _, measured, _ = run(count=40, rivals=rivals)
    best, limit = measured["picked"]["kl"], 2.0 * measured["picked"]["kl"]
    _, report, racing = race(lambda c: true_kl(c) == best, count=40, rivals=rivals, race_within=1e9)
    theirs = {TABLES.search(LIMITS, searcher=name, options=Options())[0].architecture.choices for name in rivals[:1]}
    assert {row["origin"] for row in report["race"] if row["also"]}, "the searcher found a rival's answer as well"
    assert theirs <= set(racing.asked) and min(map(true_kl, racing.asked)) == best
    mine = [row for row in report["race"] if row["origin"].startswith("mip") and not row["also"]]
    assert len(mine) <= 1 and len(racing.asked) < 40
    _, report, racing = race(lambda c: true_kl(c) == best, count=40, rivals=rivals, race_own=40, race_within=2.0)
    assert {row["kl"] for row in report["race"]} == {r["kl"] for r in measured["candidates"] if r["kl"] <= limit}


def test_an_answer_to_corrected_scores_races_as_the_searchers_own():
    _, measured, _ = run(count=2, corrections=4)
    corrected = [row for row in measured["candidates"] if "corrected" in row["origin"]]
    best = min(row["kl"] for row in measured["candidates"])
    _, report, racing = race(lambda c: true_kl(c) == best, count=2, corrections=4, race_own=1, race_within=1e9)
    assert corrected and len(racing.asked) < 2, "of the searcher's own there is one, and so no race"
    own = len(measured["candidates"])
    _, report, racing = race(lambda c: true_kl(c) == best, count=2, corrections=4, race_own=own, race_within=1e9)
    assert {row["origin"] for row in report["race"]} >= {row["origin"] for row in corrected}


def test_the_searcher_is_no_rival_of_itself():
    setup = SearchSetup(SPACE, SCORES, PROFILE, SCENARIO, "kl", "mip", 60.0, LIMITS, 0)
    search = SearchConfig(limits=LIMITS, candidates=3, rivals=("mip", "greedy", "greedy"), race_rungs=2, race_within=1e9)
    racing = RaceOf(lambda choices: choices == racing.asked[0])
    _, report = pick_as_configured(setup, search, Meter(), race=racing)
    assert len(racing.asked) <= search.most_racing == 2
    assert all(set(row["also"]) <= {"greedy"} and len(row["also"]) <= 1 for row in report["race"])


def test_one_that_is_alone_within_the_limit_begins_no_race():
    plain, before, _ = run(count=3)
    found, report, racing = race(lambda c: True, count=3, race_own=3, race_within=1.0)
    assert racing.asked == [] and report["race"] == [] and found.choices == plain.choices
    assert {k: v for k, v in report.items() if k != "race"} == before
