"""From a space, scores and a profile to architectures: costs by hand, every limit, brute force, what the user fixes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from pydantic import ValidationError
from search_inputs import LAYERS, PROFILE, SCENARIO, SCORES, SPACE, make_profile

from puzzle_ray.artifacts import LayerChoice, LayerSpace, ProfileRow, Scenario, ScoreRow, Scores, SearchSpace
from puzzle_ray.errors import ConfigError, Infeasible, ProfileError
from puzzle_ray.search.limits import FixedChoice, Limits
from puzzle_ray.search.searchers.uniform import uniform_architectures
from puzzle_ray.search.tables import predicted_costs, search_architectures

PARENT = predicted_costs(SPACE, PROFILE, SCENARIO, [LayerChoice()] * LAYERS)


def find(limits, **more):
    return search_architectures(SPACE, SCORES, PROFILE, SCENARIO, limits, **more)


def objective(choices):
    return sum(SCORES.value(layer, choice, "kl") for layer, choice in enumerate(choices))


def within(limits, costs) -> bool:
    """Every limit by its definition, from predicted costs."""
    checks = {
        "speedup": lambda x: PARENT.runtime_ms / costs.runtime_ms >= x,
        "throughput_tokens_per_s": lambda x: 4 * 41 / (costs.runtime_ms / 1000) >= x,
        "latency_ms": lambda x: costs.runtime_ms <= x,
        "latency_fraction": lambda x: costs.runtime_ms <= x * PARENT.runtime_ms,
        "prefill_ms": lambda x: costs.prefill_ms <= x,
        "decode_ms": lambda x: costs.decode_ms <= x,
        "memory_mib": lambda x: costs.memory_mib <= x,
        "memory_fraction": lambda x: costs.memory_mib <= x * PARENT.memory_mib,
        "params": lambda x: costs.num_params <= x,
        "params_fraction": lambda x: costs.num_params <= x * PARENT.num_params,
    }
    least = {
        "params": lambda x: costs.num_params >= x,
        "memory_mib": lambda x: costs.memory_mib >= x,
        "latency_fraction": lambda x: costs.runtime_ms >= x * PARENT.runtime_ms,
    }
    enough = all(least[name](asked) for name, asked in limits.at_least.items())
    return enough and all(checks[name](asked) for name, asked in limits.asked.items())


def test_predicted_costs_are_the_sum_of_the_parts():
    """4 layers of size 3 and a fixed part of 0.5: 12.5 units. The prefill yields the first of 11 tokens."""
    assert PARENT.prefill_ms == pytest.approx(8.0 * 12.5)
    assert PARENT.decode_ms == pytest.approx(0.5 * 12.5)
    assert PARENT.runtime_ms == pytest.approx(100.0 + 10 * 6.25)
    assert PARENT.throughput_tokens_per_s == pytest.approx(4 * (30 + 11) / 0.1625)
    assert PARENT.num_params == 6250
    assert PARENT.memory_mib == pytest.approx(12.5 + 4 * 41 * 4 * 64 / 2**20)


@pytest.mark.parametrize(
    "limits",
    [
        {"speedup": 1.5},
        {"throughput_tokens_per_s": 1500.0},
        {"latency_ms": 110.0},
        {"latency_fraction": 0.7},
        {"prefill_ms": 60.0},
        {"decode_ms": 4.0},
        {"memory_mib": 9.0},
        {"memory_fraction": 0.6},
        {"params": 4000},
        {"params_fraction": 0.5},
        {"speedup": 1.3, "memory_fraction": 0.65, "params": 4500},
        {"speedup": 0.5},
        {"params": [2600, 3800], "latency_ms": 200.0},
        {"memory_mib": [6.0, 9.0], "latency_fraction": [0.3, 0.6]},
    ],
    ids=str,
)
def test_the_answer_is_the_best_that_meets_the_limits(limits):
    limits = Limits(**limits)
    (found,) = find(limits)
    every = itertools.product(SPACE.layers[0].choices, repeat=LAYERS)
    best = min(objective(c) for c in every if within(limits, predicted_costs(SPACE, PROFILE, SCENARIO, c)))
    assert found.objective == pytest.approx(best) == pytest.approx(objective(found.choices))
    assert found.status == "optimal" and found.gap < 1e-9
    assert within(limits, found.predicted)
    assert found.predicted == predicted_costs(SPACE, PROFILE, SCENARIO, found.choices)
    assert found.limits == limits.asked | {f"{name}_min": x for name, x in limits.at_least.items()}
    assert found.parent_predicted == PARENT


def damage_reversed() -> Scores:
    """What is cheapest is best, so that only a minimum keeps anything."""
    return Scores(tuple(replace(row, value=-row.value) for row in SCORES.rows), SCORES.granularity)


def test_a_range_keeps_at_least_its_minimum():
    limits = Limits(params=[3000, 4000])
    (found,) = search_architectures(SPACE, damage_reversed(), PROFILE, SCENARIO, limits)
    every = itertools.product(SPACE.layers[0].choices, repeat=LAYERS)
    best = max(objective(c) for c in every if within(limits, predicted_costs(SPACE, PROFILE, SCENARIO, c)))
    assert 3000 <= found.predicted.num_params <= 4000 and -found.objective == pytest.approx(best)
    with pytest.raises(Infeasible, match="params >= 7000; the best reachable is 6250"):
        find(Limits(params=[7000, 9000]))


def heads(choices) -> int:
    """`gqa:2` has 44 bytes of cache per token, so the parent's 64 are 2.9 heads: 3."""
    return sum({"parent": 3, "gqa:2": 2, "noop": 0}[c.attention] for c in choices)


def test_kv_heads_and_the_cache_can_be_limited():
    every = list(itertools.product(SPACE.layers[0].choices, repeat=LAYERS))
    (found,) = search_architectures(SPACE, damage_reversed(), PROFILE, SCENARIO, Limits(kv_heads=[5, 7]))
    assert 5 <= heads(found.choices) <= 7
    assert -found.objective == pytest.approx(max(objective(c) for c in every if 5 <= heads(c) <= 7))
    (found,) = find(Limits(kv_heads=7))
    assert found.objective == pytest.approx(min(objective(c) for c in every if heads(c) <= 7))
    (found,) = find(Limits(kv_cache_mib=0.02))
    cache = {"parent": 64, "gqa:2": 44, "noop": 0}
    assert sum(cache[c.attention] for c in found.choices) * 4 * 41 / 2**20 <= 0.02
    none = SearchSpace((LayerSpace(("parent", "noop"), ("parent", "ffn:64")),) * LAYERS)
    (found,) = search_architectures(
        none, SCORES, PROFILE, SCENARIO, Limits(kv_heads=4)
    )  # a narrowed space may have lost the variant to count by
    assert heads(found.choices) == 3
    unknown = replace(PROFILE, rows=tuple(row for row in PROFILE.rows if row.variant != "gqa:2"))
    with pytest.raises(ConfigError, match="limit kv_cache_mib"):
        search_architectures(none, SCORES, unknown, SCENARIO, Limits(kv_heads=4))


def test_a_window_has_all_of_the_kv_heads():
    """It keeps 16 of 64 bytes a token since most tokens are gone, not heads."""
    space = SearchSpace((LayerSpace(("parent", "window:8", "gqa:2"), ("parent",)),) * LAYERS)
    window = replace(PROFILE.row("full_attention", "attention", "parent", 4), variant="window:8", kv_bytes_per_token=16)
    profile = replace(PROFILE, rows=(*PROFILE.rows, window))
    score = {"parent": 0.0, "window:8": 0.1, "gqa:2": 1.0}
    rows = tuple(ScoreRow(i, a, "parent", "kl", x, 0.0, 1) for i in range(LAYERS) for a, x in score.items() if x)
    (found,) = search_architectures(space, Scores(rows, "block"), profile, SCENARIO, Limits(kv_heads=11))
    assert sorted(c.attention for c in found.choices) == ["gqa:2", "parent", "parent", "parent"]  # 3 heads each but for one
    (found,) = search_architectures(space, Scores(rows, "block"), profile, SCENARIO, Limits(kv_cache_mib=4 * 41 * 64 / 2**20))
    assert {c.attention for c in found.choices} == {"window:8"}


def test_what_the_user_fixed_stays():
    fixed = {0: FixedChoice(attention="parent", ffn="parent"), 2: FixedChoice(ffn="ffn:64")}
    (found,) = find(Limits(speedup=1.5, fixed=fixed))
    assert found.choices[0] == LayerChoice() and found.choices[2].ffn == "ffn:64"
    assert found.objective >= find(Limits(speedup=1.5))[0].objective


def test_layers_that_must_agree_take_the_best_common_choice():
    limits = Limits(speedup=1.5, agree=((0, 2), (1, 3)))
    (found,) = find(limits)
    every = [(a, b, a, b) for a, b in itertools.product(SPACE.layers[0].choices, repeat=2)]
    best = min(objective(c) for c in every if within(limits, predicted_costs(SPACE, PROFILE, SCENARIO, c)))
    assert found.choices[0] == found.choices[2] and found.choices[1] == found.choices[3]
    assert found.objective == pytest.approx(best)


def test_several_answers_differ_and_get_no_better():
    found = find(Limits(speedup=1.4), count=4, min_different_layers=2)
    assert [a.objective for a in found] == sorted(a.objective for a in found)
    for a, b in itertools.combinations(found, 2):
        assert sum(x != y for x, y in zip(a.choices, b.choices, strict=True)) >= 2


def test_where_there_are_no_more_answers_fewer_come_back():
    fixed = {layer: FixedChoice(attention="parent", ffn="parent") for layer in range(3)}
    found = find(Limits(speedup=0.9, fixed=fixed), count=10, min_different_layers=1)
    assert len(found) == len(SPACE.layers[3].choices)


def test_the_batch_size_with_the_least_damage_is_chosen():
    """At batch 8 the parent already serves 2 / 1.8 times as many tokens a second: such a limit costs less there."""
    profile = make_profile(4, 8)
    (found,) = search_architectures(SPACE, SCORES, profile, SCENARIO, Limits(speedup=1.1))
    assert found.choices == (LayerChoice(),) * LAYERS and found.predicted.batch_size == 8
    gained = found.predicted.throughput_tokens_per_s / found.parent_predicted.throughput_tokens_per_s
    assert gained == pytest.approx(2 / 1.8)
    (both,) = search_architectures(SPACE, SCORES, profile, SCENARIO, Limits(speedup=1.1, latency_ms=170.0))
    assert both.predicted.batch_size == 4 and both.predicted.runtime_ms <= 170.0


def test_a_budget_below_the_cheapest_names_the_best_reachable():
    """All no-op attention and narrow FFN: 4 x 1 + 0.5 of 12.5 units, 2.78 x faster."""
    with pytest.raises(Infeasible) as caught:
        find(Limits(speedup=3.0))
    assert caught.value.args[:3] == ("speedup", ">=", 3.0)
    assert caught.value.args[3] == pytest.approx(12.5 / 4.5)
    assert "best reachable is 2.77778" in str(caught.value)


def test_uniform_architectures_come_by_closeness_to_a_runtime():
    target = 0.6 * PARENT.runtime_ms
    found = uniform_architectures(SPACE, SCORES, PROFILE, SCENARIO, target)
    distances = [abs(a.predicted.runtime_ms - target) for a in found]
    assert distances == sorted(distances) and len(found) == len(SPACE.layers[0].choices)
    assert all(len(set(a.choices)) == 1 and a.objective == pytest.approx(objective(a.choices)) for a in found)


@pytest.mark.parametrize("name", ["evolutionary", "greedy", "max_params", "random", "reinforce", "uniform"])
def test_other_searchers_answer_through_the_same_door(name):
    (found,) = find(Limits(speedup=1.4), searcher=name)
    assert within(Limits(speedup=1.4), found.predicted) and found.status == "heuristic"
    assert found.objective >= find(Limits(speedup=1.4))[0].objective - 1e-12 >= found.bound - 1e-9


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            Limits(speedup=1.5, fixed={0: FixedChoice(attention="gqa:3")}),
            "has no variant 'gqa:3'; did you mean 'gqa:2'",
        ),
        (Limits(speedup=1.5, fixed={4: FixedChoice(ffn="parent")}), "layers go from 0 to 3"),
        (Limits(speedup=1.5, agree=((0, 9),)), "layers go from 0 to 3"),
        (
            Limits(speedup=1.5, agree=((0, 1),), fixed={0: FixedChoice(ffn="parent"), 1: FixedChoice(ffn="ffn:64")}),
            r"layers \[0, 1\] have no choice in common",
        ),
    ],
)
def test_settings_that_do_not_fit_the_space_are_refused(limits, message):
    with pytest.raises(ConfigError, match=message):
        find(limits)


def test_missing_numbers_are_refused():
    with pytest.raises(ConfigError, match=r"layer \d has no lm_loss score"):
        find(Limits(speedup=1.5), metric="lm_loss")
    with pytest.raises(ProfileError, match="16 was not profiled; profiled: 4"):
        search_architectures(SPACE, SCORES, PROFILE, replace(SCENARIO, batch_size=16), Limits(speedup=1.5))
    with pytest.raises(ProfileError, match="99 tokens in"):
        search_architectures(SPACE, SCORES, PROFILE, replace(SCENARIO, input_tokens=99), Limits(speedup=1.5))
    fewer = replace(PROFILE, rows=tuple(row for row in PROFILE.rows if row.variant != "noop"))
    with pytest.raises(ProfileError, match="'noop'"):
        search_architectures(SPACE, SCORES, fewer, SCENARIO, Limits(speedup=1.5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give at least one of speedup, "),
        ({"fixed": {0: {"ffn": "parent"}}}, "give at least one of"),
        ({"speedup": 0.0}, "greater than 0"),
        ({"memory_fraction": 1.2}, "less than or equal to 1"),
        ({"speedup": 2.0, "fixed": {0: {}}}, "fixes nothing"),
        ({"speedup": 2.0, "agree": [[1]]}, "two layers or more"),
        ({"speedup": 2.0, "agree": [[1, 2], [2, 3]]}, "only one"),
        ({"sped": 2.0}, "Extra inputs"),
        ({"speedup": [1.5, 2.0]}, "a range is .min, max. of a cost"),
        ({"params": [1, 2, 3]}, "a range is"),
        ({"params": [5000, 4000]}, "at least 5000 and at most 4000; swap them"),
        ({"params": [5000, None]}, "no limit is given"),
        ({"speedup": 2.0, "at_least": {"parms": 4}}, "did you mean 'params'"),
    ],
)
def test_limits_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        Limits.model_validate(values)


def test_what_a_heuristic_does_not_find_at_a_batch_size_is_no_part_of_its_bound():
    """Within 3 to 10 ms, batch size 4 has two no-ops alone, and batch size 8 one of each, which no uniform choice is."""

    def row(subblock, variant, size, ms):
        layer_type = "" if subblock == "fixed" else "full_attention"
        return ProfileRow(layer_type, subblock, variant, size, 30, 1, ms, 0.0, 0.0, 0.0, 100, 0, 100)

    of_4, of_8 = {"parent": 20.0, "noop": 4.0}, {"parent": 8.0, "noop": 0.0}
    rows = [row("attention", v, size, ms) for size, own in ((4, of_4), (8, of_8)) for v, ms in own.items()]
    rows += [row(s, v, size, 1.0 if s == "fixed" else 0.0) for size in (4, 8) for s, v in (("ffn", "parent"), ("fixed", "fixed"))]
    space = SearchSpace((LayerSpace(("parent", "noop"), ("parent",)),) * 2)
    scores = Scores(tuple(ScoreRow(i, "noop", "parent", "kl", i + 1.0, 0.0, 1) for i in range(2)), "block")
    of = (space, scores, replace(PROFILE, rows=tuple(rows)), Scenario(4, 30, 1), Limits(latency_ms=[3.0, 10.0]))
    (best,), (found,) = (search_architectures(*of, searcher=name) for name in ("mip", "uniform"))
    assert (best.objective, best.predicted.batch_size) == (1.0, 8) and best.status == "optimal"
    assert (found.objective, found.predicted.batch_size) == (3.0, 4)
    assert found.bound <= 1.0
