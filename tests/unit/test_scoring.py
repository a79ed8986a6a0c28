"""Replace-one scores: prefix reuse changes nothing, cutting a model into shards changes nothing, and the metrics mean what they say."""

import math

import pytest
import torch
from torch.nn import functional as F

from puzzle_ray.artifacts import KINDS, PARENT, LayerChoice, Scores
from puzzle_ray.blocks import load_stack, search_space, subblock_state
from puzzle_ray.checkpoint import read_config
from puzzle_ray.config import ScoringConfig
from puzzle_ray.export.hf import assemble, load_model, new_child
from puzzle_ray.families import describe
from puzzle_ray.progress import Quiet
from puzzle_ray.scoring.metrics import compare, standard_error
from puzzle_ray.scoring.replace_one import Item, ShardScorer, plan, rows_of, score_serially
from puzzle_ray.store import Store

BATCHES = [torch.arange(32).remainder(96).reshape(2, 16), torch.arange(50, 82).remainder(96).reshape(2, 16)]


@pytest.fixture(scope="module")
def parent(parent_folder):
    config = read_config(parent_folder)
    return parent_folder, config, describe(config), search_space(config, ("gqa:1", "noop"), ("ffn:24", "noop"), 8)


def states(config, descriptor, choice):
    """Random weights for the replaced subblocks."""
    torch.manual_seed(1)
    layer = new_child(config, [choice] * 3, torch.float32).model.layers[0]
    return {k: subblock_state(layer, k, descriptor) for k in KINDS if choice.variant(k) != PARENT}


@pytest.mark.parametrize("borders", [[0, 3], [0, 1, 3], [0, 1, 2, 3]])
def test_scores_equal_the_whole_models_bit_for_bit(parent, borders):
    folder, config, descriptor, space = parent
    shards, entering = [], BATCHES
    for first, last in zip(borders, borders[1:], strict=False):
        shards.append(ShardScorer(load_stack(folder, descriptor, config, first, last, torch.float32), BATCHES))
        entering = shards[-1].run_parent(entering)
    reference = load_model(folder, torch.float32)
    for item in plan(space, "block"):
        own = states(config, descriptor, item.choice)
        at = next(n for n, shard in enumerate(shards) if item.layer in range(shard.stack.first, shard.stack.last))
        leaving = shards[at].exchange(item, own)
        for shard in shards[at + 1 :]:
            leaving = shard.suffix(leaving)
        found = shards[-1].measure(leaving)
        choices = [item.choice if i == item.layer else LayerChoice() for i in range(3)]
        child = assemble(folder, config, choices, {(item.layer, k): v for k, v in own.items()}, torch.float32)
        with torch.no_grad():
            expected = [compare(F.log_softmax(reference(ids).logits, -1), child(ids).logits, ids) for ids in BATCHES]
        assert found.kl == expected[0].kl + expected[1].kl and found.lm_loss == expected[0].lm_loss + expected[1].lm_loss


def test_metrics_against_their_formulas():
    torch.manual_seed(0)
    p, q, ids = torch.randn(2, 5, 7), torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    found = compare(F.log_softmax(p, -1), q, ids)
    kl = F.kl_div(F.log_softmax(q, -1), F.softmax(p, -1), reduction="none").sum(-1).mean(-1)
    assert found.kl == pytest.approx(kl.tolist(), rel=1e-5)
    loss = [F.cross_entropy(q[b, :-1], ids[b, 1:]).item() for b in range(2)]
    assert found.lm_loss == pytest.approx(loss, rel=1e-5) and found.tokens == 10
    same = compare(F.log_softmax(p, -1), p, ids)
    assert max(map(abs, same.kl)) < 1e-6 and same.top1_agreement == (1.0, 1.0)


def test_standard_error_of_the_mean():
    assert standard_error((1.0, 3.0)) == pytest.approx(math.sqrt(2) / math.sqrt(2)) and standard_error((1.0,)) == 0.0


def test_plan_covers_each_exchange_once(parent):
    *_, space = parent
    block, subblock = plan(space, "block"), plan(space, "subblock")
    assert len(block) == len(set(block)) == 3 * (3 * 3 - 1) and len(subblock) == 3 * (2 + 2)
    assert set(subblock) <= set(block) and not any(item.choice == LayerChoice() for item in block)
    assert len({item.name for item in block}) == len(block)


def test_differences_from_the_parent_are_zero_for_the_parent(parent):
    folder, config, descriptor, _ = parent
    scorer = ShardScorer(load_stack(folder, descriptor, config, 0, 3, torch.float32), BATCHES)
    leaving = scorer.run_parent(BATCHES)
    rows = rows_of(Item(0, LayerChoice()), scorer.measure(leaving), scorer.parent_loss())
    assert all(abs(row.value) < 1e-6 for row in rows)


def test_subblock_scores_add_and_block_scores_must_be_measured():
    from puzzle_ray.artifacts import ScoreRow

    rows = (ScoreRow(0, "noop", "parent", "kl", 0.5, 0, 1), ScoreRow(0, "parent", "noop", "kl", 0.25, 0, 1))
    assert Scores(rows, "subblock").value(0, LayerChoice("noop", "noop"), "kl") == 0.75
    with pytest.raises(KeyError):
        Scores(rows, "block").value(0, LayerChoice("noop", "noop"), "kl")
    again = Scores.from_parquet(Scores(rows, "subblock").to_parquet())
    assert again == Scores(rows, "subblock")


def test_an_interrupted_scoring_scores_nothing_twice(parent, tmp_path):
    folder, config, descriptor, space = parent
    stack = load_stack(folder, descriptor, config, 0, 3, torch.float32)
    asked = []

    def states_of(layer, choice):
        asked.append((layer, choice))
        if len(asked) == 5:
            raise KeyboardInterrupt
        return states(config, descriptor, choice)

    step = Store(str(tmp_path)).step("scores", {}, {})
    arguments = (stack, BATCHES, space, ScoringConfig(granularity="block"), step, states_of, Quiet())
    with pytest.raises(KeyboardInterrupt):
        score_serially(*arguments)
    scores = score_serially(*arguments)
    counted = {item: asked.count(item) for item in asked}
    assert sum(counted.values()) == 24 + 1 and max(counted.values()) == 2  # only the interrupted one was asked for again
    assert len(scores.rows) == 24 * 3 and step.finished
