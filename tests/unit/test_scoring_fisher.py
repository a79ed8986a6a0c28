"""The Fisher estimate is the second-order KL it claims to be, is the same however a model is cut, and leads to a sound shortlist."""

import functools
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from puzzle_ray.artifacts import KINDS, PARENT, LayerChoice, SearchSpace
from puzzle_ray.errors import ConfigError
from puzzle_ray.models.blocks import load_stack, subblock_state
from puzzle_ray.models.child import read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.progress import Quiet
from puzzle_ray.scoring import fisher
from puzzle_ray.scoring.metrics import mean
from puzzle_ray.scoring.replacements import Damage, Replacement, ScoringTask, all_replacements
from puzzle_ray.scoring.serial import score_serially
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.scoring.shard import ShardScorer
from puzzle_ray.scoring.shortlist import Calibration, choose_exact, footprints
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

TEXTS = [torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(n)) for n in range(3)]


@pytest.fixture(scope="module")
def parent(parent_folder):
    config = read_config(parent_folder)
    return parent_folder, config, describe(config), search_space(config, ("gqa:1", "noop"), ("ffn:24", "linear", "noop"), 8)


def nearly(parent, size):
    """Weights of parent-shaped subblocks with `size` of noise: variants whose damage is small and known to be of second order."""
    folder, config, descriptor, _ = parent
    stack = load_stack(folder, descriptor, config, 0, 3, torch.float32)

    def states_of(layer, choice):
        generator = torch.Generator().manual_seed(layer)
        return {
            kind: {
                name: value * (1 + size * torch.randn(value.shape, generator=generator))
                for name, value in subblock_state(stack.layer(layer), kind, descriptor).items()
            }
            for kind in KINDS
            if choice.variant(kind) != PARENT
        }

    return states_of


def scorers(parent, borders):
    folder, config, descriptor, _ = parent
    entering, found = TEXTS, []
    for first, last in itertools.pairwise(borders):
        found.append(ShardScorer(load_stack(folder, descriptor, config, first, last, torch.float32), TEXTS))
        entering = found[-1].run_parent(entering)
    return found


def same_shape(space):
    """A space whose variants have the parent's own shape: full-width `gqa:2` and `ffn:48`."""
    layer = type(space.layers[0])((PARENT, "gqa:2"), (PARENT, "ffn:48"), space.layers[0].layer_type)
    return SearchSpace((layer,) * len(space.layers))


def test_the_estimate_nears_the_exact_kl_of_small_changes(parent):
    space, states_of = same_shape(parent[3]), nearly(parent, 0.01)
    (scorer,) = scorers(parent, [0, 3])
    config = ScoringConfig(granularity="block", fisher_samples=200)
    found, _ = fisher.shard_estimates(scorer, (0, 1, 2), None, space, config, states_of)
    for item in all_replacements(space, "block"):
        task = ScoringTask((item,), (0, 1, 2))
        (damage,) = scorer.measure(task, scorer.run_replacements(task, states_of))
        assert mean(found[fisher.estimate_key(item)]) == pytest.approx(mean(Damage.joined(damage).values["kl"]), rel=0.3)


def test_one_layers_ffn_at_one_position_is_unbiased(parent):
    """A single token has no other positions: the estimate's expectation is the whole second-order KL, written out here."""
    folder, config, descriptor, space = parent
    stack = load_stack(folder, descriptor, config, 2, 3, torch.float32)
    stack.embedding = load_stack(folder, descriptor, config, 0, 1, torch.float32).embedding
    ids = [torch.tensor([[5], [17]])]
    scorer = ShardScorer(stack, ids)
    scorer.run_parent(ids)
    space = SearchSpace((same_shape(space).layers[0],) * 3)
    states_of = nearly(parent, 0.1)
    settings = ScoringConfig(granularity="subblock", fisher_samples=4_000)
    found, _ = fisher.shard_estimates(scorer, (0,), None, space, settings, states_of)
    item = Replacement(2, LayerChoice(ffn="ffn:48"))
    changed = scorer.run_replacements(ScoringTask((item,), (0,)), states_of)[0]
    end = scorer.inputs[0][3]
    jacobian = torch.autograd.functional.jvp(stack.logits, end, changed - end)[1]
    p = F.softmax(stack.logits(end), -1)
    second_order = ((p * jacobian.square()).sum(-1) - (p * jacobian).sum(-1).square()).flatten() / 2
    assert found[fisher.estimate_key(item)] == pytest.approx(second_order.tolist(), rel=0.1)


@pytest.mark.parametrize("borders", [[0, 1, 3], [0, 1, 2, 3]])
def test_cutting_the_model_changes_no_bit(parent, borders):
    space, config = same_shape(parent[3]), ScoringConfig(granularity="block", fisher_samples=2)
    states_of = nearly(parent, 0.1)
    whole, gradients = {}, None
    for shard in reversed(scorers(parent, borders)):
        found, gradients = fisher.shard_estimates(shard, (0, 2), gradients, space, config, states_of)
        whole |= found
    expected, _ = fisher.shard_estimates(scorers(parent, [0, 3])[0], (0, 2), None, space, config, states_of)
    assert whole == expected and len(expected) == 9 and all(len(values) == 8 for values in expected.values())


@pytest.fixture(scope="module")
def random_states(parent):
    """A function of layer and choice: random weights of its replaced subblocks, the same ones whenever it is asked."""
    from puzzle_ray.models.child import new_child

    _, config, descriptor, _ = parent

    @functools.cache
    def states_of(layer, choice):
        torch.manual_seed(layer)
        child = new_child(config, [choice] * 3, torch.float32).model.layers[layer]
        return {k: subblock_state(child, k, descriptor) for k in KINDS if choice.variant(k) != PARENT}

    return states_of


@pytest.fixture(scope="module", params=["block", "subblock"])
def scored(request, parent, random_states, tmp_path_factory):
    """(granularity, a function that scores with further settings, what it gives without a shortlist)"""
    folder, config, descriptor, space = parent
    stack, store = load_stack(folder, descriptor, config, 0, 3, torch.float32), Store(str(tmp_path_factory.mktemp("store")))

    def score(**settings):
        step = store.artifact("scores", settings, {})
        options = ScoringConfig(granularity=request.param, **settings)
        return score_serially(stack, TEXTS, space, options, step, random_states, Quiet()), step

    torch.set_num_threads(1)
    return request.param, score, score()[0]


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_a_shortlist_scores_its_share_exactly_and_the_rest_by_estimate(parent, scored, keep):
    space, (granularity, score, exact) = parent[3], scored
    short, step = score(shortlist="fisher", shortlist_keep=keep)
    items = all_replacements(space, granularity)
    kl = {(r.layer, r.attention, r.ffn): r for r in short.rows if r.metric == "kl"}
    estimates = {(r.layer, r.attention, r.ffn): r.value for r in short.rows if r.metric == "fisher"}
    assert len(kl) == len(estimates) == len(items) and step.facts()["estimated"] == sum(r.tokens == 0 for r in kl.values())
    per_layer = len(items) // 3
    for layer in range(3):
        measured = [key for key, row in kl.items() if row.tokens > 0 and key[0] == layer]
        assert len(measured) == -(-per_layer * keep // 1)
    for row in (r for r in kl.values() if r.tokens > 0):
        assert row in exact.rows
    left = sorted((estimates[key], row.value) for key, row in kl.items() if row.tokens == 0)
    assert [v for _, v in left] == sorted(v for _, v in left)
    again, _ = score(shortlist="fisher", shortlist_keep=keep)
    assert again == short


def test_beaten_candidates_come_last_and_cheap_ones_are_not_beaten():
    small, large, bad = (Replacement(0, LayerChoice(ffn=f"ffn:{n}")) for n in (8, 16, 24))
    noop = Replacement(0, LayerChoice(ffn="noop"))
    weigh = {small: (8, 0), large: (16, 0), bad: (24, 0), noop: (0, 0)}
    values = {small: 0.3, large: 0.1, bad: 0.2, noop: 5.0}
    items = [small, large, bad, noop]
    assert choose_exact(items, values, weigh, 0.75) == (small, large, noop)  # `bad` costs more than `large` and is worse
    assert choose_exact(items, values, weigh, 0.5) == (small, large)
    assert choose_exact(items, values, weigh, 1.0) == tuple(items) and choose_exact(items, values, weigh, 0.0) == ()


def test_calibration_finds_a_power_law_and_always_increases():
    x = [0.01, 0.1, 0.5, 2.0]
    fit = Calibration.fit(x, [3 * v**0.8 for v in x])
    assert (fit.factor, fit.exponent) == (pytest.approx(3), pytest.approx(0.8)) and fit.spread < 1e-9
    assert Calibration.fit([], []) == Calibration() and Calibration.fit([1, 2], [2, 4])(3) == pytest.approx(6)
    falling = Calibration.fit(x, [1 / v for v in x])
    assert falling(2.0) > falling(1.0)
    assert Calibration.fit([1, 1, 1], [2, 2, 2])(1) == pytest.approx(2)
    alike = Calibration.fit([1e-3, 1.0005e-3, 1.001e-3], [0.1, 0.15, 0.2])  # a slope of 700 fits them best
    assert alike(1e-3) == pytest.approx(0.15, rel=0.05) and 0 < alike(1e-6) < alike(1.0) < math.inf


def test_sizes_are_those_of_the_real_modules(parent):
    folder, config, descriptor, space = parent
    found = footprints(space, descriptor, config)
    layer = load_stack(folder, descriptor, config, 0, 1, torch.float32).layer(0)
    parents = sum(p.numel() for p in layer.mlp.parameters()) + layer.post_attention_layernorm.weight.numel()
    assert found[space.layers[0], "ffn", PARENT] == (parents, 0) and found[space.layers[0], "ffn", "noop"] == (0, 0)
    assert found[space.layers[0], "attention", PARENT][1] == 2 * found[space.layers[0], "attention", "gqa:1"][1] == 16
    assert found[space.layers[0], "attention", "noop"] == (0, 0)


@pytest.mark.parametrize("settings", [{"metric": "fisher"}, {"metric": "downstream"}, {"shortlist_keep": 2}, {"metric": "mse"}])
def test_settings_that_do_not_fit_are_refused(settings):
    from puzzle_ray.config import validated

    with pytest.raises(ConfigError, match="scoring"):
        validated({"scoring": settings})
