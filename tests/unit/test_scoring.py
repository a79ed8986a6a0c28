"""Replace-one scores: prefix reuse changes nothing, cutting a model into shards changes nothing, and the metrics mean what they say."""

import math

import pytest
import torch
from torch.nn import functional as F

from puzzle_ray.artifacts import KINDS, PARENT, LayerChoice, Scores
from puzzle_ray.models.blocks import load_stack, subblock_state
from puzzle_ray.models.child import assemble, load_model, new_child, read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.progress import Quiet
from puzzle_ray.scoring.metrics import compare_predictions, standard_error
from puzzle_ray.scoring.racing import batch_rounds, is_precise
from puzzle_ray.scoring.replacements import (
    Damage,
    Replacement,
    ScoringTask,
    all_replacements,
    replacement_groups,
    score_rows,
)
from puzzle_ray.scoring.serial import score_serially
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.scoring.shard import ShardScorer
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

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


def whole_model_damage(reference, child, ids):
    parent, changed = (model.model(ids).last_hidden_state for model in (reference, child))
    log_probs = F.log_softmax(reference(ids).logits, -1)
    loss = F.nll_loss(log_probs[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(-1)
    return Damage.of(compare_predictions(log_probs, child(ids).logits, ids, parent, changed), loss.tolist())


@pytest.mark.parametrize("borders", [[0, 3], [0, 1, 3], [0, 1, 2, 3]])
def test_scores_equal_the_whole_models_bit_for_bit(parent, borders):
    folder, config, descriptor, space = parent
    shards, entering = [], BATCHES
    for first, last in zip(borders, borders[1:], strict=False):
        shards.append(ShardScorer(load_stack(folder, descriptor, config, first, last, torch.float32), BATCHES))
        entering = shards[-1].run_parent(entering)
    reference = load_model(folder, torch.float32)
    for item in all_replacements(space, "block"):
        own = states(config, descriptor, item.choice)
        at = next(n for n, shard in enumerate(shards) if item.layer in range(shard.stack.first, shard.stack.last))
        task = ScoringTask((item,), (0, 1))
        leaving = shards[at].run_replacements(task, lambda *_, own=own: own)
        for shard in shards[at + 1 :]:
            leaving = shard.run_suffix(task, leaving)
        (found,) = shards[-1].measure(task, leaving)
        choices = [item.choice if i == item.layer else LayerChoice() for i in range(3)]
        child = assemble(folder, config, choices, {(item.layer, k): v for k, v in own.items()}, torch.float32)
        with torch.no_grad():
            expected = [whole_model_damage(reference, child, ids) for ids in BATCHES]
        found = Damage.joined(found)
        assert found == Damage.joined(expected) and found.tokens["kl"] == 64


def test_metrics_against_their_formulas():
    torch.manual_seed(0)
    p, q, ids = torch.randn(2, 5, 7), torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    found = compare_predictions(F.log_softmax(p, -1), q, ids)
    kl = F.kl_div(F.log_softmax(q, -1), F.softmax(p, -1), reduction="none").sum(-1).mean(-1)
    assert found.kl == pytest.approx(kl.tolist(), rel=1e-5)
    loss = [F.cross_entropy(q[b, :-1], ids[b, 1:]).item() for b in range(2)]
    assert found.lm_loss == pytest.approx(loss, rel=1e-5) and found.tokens == 10
    same = compare_predictions(F.log_softmax(p, -1), p, ids)
    assert max(map(abs, same.kl)) < 1e-6 and same.top1_agreement == (1.0, 1.0)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_agreement_is_the_share_of_positions_whose_best_parent_token_is_in_the_childs_top_k(k):
    torch.manual_seed(0)
    p, q, ids = torch.randn(2, 50, 30), torch.randn(2, 50, 30), torch.randint(0, 30, (2, 50))
    found = getattr(compare_predictions(F.log_softmax(p, -1), q, ids), f"top{k}_agreement")
    expected = (q.topk(k).indices == p.argmax(-1, keepdim=True)).any(-1).float().mean(-1)
    assert found == pytest.approx(expected.tolist()) and 0 < max(found) < 1


def test_of_equal_logits_the_first_counts_and_one_that_is_no_number_agrees_with_nothing():
    """16 bits make many logits equal; the figure is that of greedy decoding all the same."""
    torch.manual_seed(0)
    p, q, ids = torch.randn(2, 200, 30), torch.randint(0, 4, (2, 200, 30)).bfloat16(), torch.randint(0, 30, (2, 200))
    found = compare_predictions(F.log_softmax(p, -1), q, ids).top1_agreement
    assert found == pytest.approx((q.argmax(-1) == p.argmax(-1)).float().mean(-1).tolist()) and 0 < max(found) < 0.1
    assert compare_predictions(F.log_softmax(q.float(), -1), q, ids).top1_agreement == (1.0, 1.0)
    assert compare_predictions(F.log_softmax(p, -1), torch.full_like(p, torch.nan), ids).top10_agreement == (0.0, 0.0)


def test_hidden_state_metrics_against_their_formulas():
    torch.manual_seed(0)
    log_probs, ids = F.log_softmax(torch.randn(2, 5, 7), -1), torch.randint(0, 7, (2, 5))
    h, g = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    found = compare_predictions(log_probs, log_probs, ids, h, g)
    cosine = [1 - sum((a @ b / a.norm() / b.norm()).item() for a, b in zip(h[n], g[n], strict=True)) / 5 for n in range(2)]
    assert found.cosine_distance == pytest.approx(cosine, rel=1e-5)
    assert found.normalised_mse == pytest.approx([(F.mse_loss(g[n], h[n]) / h[n].square().mean()).item() for n in range(2)])
    assert compare_predictions(log_probs, log_probs, ids, h, 2 * h).cosine_distance == pytest.approx([0, 0], abs=1e-6)
    assert compare_predictions(log_probs, log_probs, ids, h, 2 * h).normalised_mse == pytest.approx([1, 1])


def test_standard_error_of_the_mean():
    assert standard_error((1.0, 3.0)) == pytest.approx(math.sqrt(2) / math.sqrt(2)) and standard_error((1.0,)) == 0.0


def test_plan_covers_each_exchange_once(parent):
    *_, space = parent
    block, subblock = all_replacements(space, "block"), all_replacements(space, "subblock")
    assert len(block) == len(set(block)) == 3 * (3 * 3 - 1) and len(subblock) == 3 * (2 + 2)
    assert set(subblock) <= set(block) and not any(item.choice == LayerChoice() for item in block)
    assert len({item.file_name for item in block}) == len(block)


def test_differences_from_the_parent_are_zero_for_the_parent(parent):
    folder, config, descriptor, _ = parent
    scorer = ShardScorer(load_stack(folder, descriptor, config, 0, 3, torch.float32), BATCHES)
    leaving = scorer.run_parent(BATCHES)
    item = Replacement(0, LayerChoice())
    (found,) = scorer.measure(ScoringTask((item,), (0, 1)), leaving)
    rows = score_rows(item, Damage.joined(found))
    assert len(rows) == 7 and all(abs(row.value) < 1e-6 for row in rows)


def test_candidates_that_share_a_pass_score_as_alone(parent, tmp_path):
    folder, config, descriptor, space = parent
    stack = load_stack(folder, descriptor, config, 0, 3, torch.float32)
    found = []
    for number in (1, 3):
        step = Store(str(tmp_path)).artifact("scores", {"candidate_batch": number}, {})
        settings = ScoringConfig(granularity="block", candidate_batch=number)
        found.append(score_serially(stack, BATCHES, space, settings, step, lambda _, c: states(config, descriptor, c), Quiet()))
    for alone, together in zip(found[0].rows, found[1].rows, strict=True):
        assert (alone.layer, alone.attention, alone.ffn) == (together.layer, together.attention, together.ffn)
        assert together.value == pytest.approx(alone.value, rel=1e-4, abs=1e-5) and together.tokens == alone.tokens


def test_groups_hold_candidates_of_one_layer(parent):
    *_, space = parent
    items = all_replacements(space, "block")
    found = replacement_groups(items, ScoringConfig(candidate_batch=3), 2, 0)
    assert [item for group in found for item in group.replacements] == items
    assert all(len(group.replacements) <= 3 and len({item.layer for item in group.replacements}) == 1 for group in found)
    assert len(found) == 3 * 3


@pytest.mark.parametrize("texts", [1, 2, 3, 4, 7, 8, 16])
def test_rounds_read_every_batch_once_and_questions_first(texts):
    for racing in (False, True):
        found = batch_rounds(texts, 2, racing)
        assert sorted(b for r in found for b in r) == list(range(texts + 2)) and {texts, texts + 1} <= set(found[0])
    assert len(batch_rounds(16, 0, True)) == 5 and len(batch_rounds(16, 0, False)) == 1


def test_racing_reads_more_only_where_the_error_is_still_large(parent, tmp_path):
    folder, config, descriptor, space = parent
    stack = load_stack(folder, descriptor, config, 0, 3, torch.float32)
    texts = [torch.randint(0, 96, (8, 16), generator=torch.Generator().manual_seed(n)) for n in range(4)]

    def score(**settings):
        step = Store(str(tmp_path)).artifact("scores", settings, {})
        options = ScoringConfig(granularity="subblock", **settings)
        return score_serially(stack, texts, space, options, step, lambda _, c: states(config, descriptor, c), Quiet())

    whole, raced = score(), score(racing=True, racing_stderr=0.06)
    kl = [row for row in raced.rows if row.metric == "kl"]
    assert {row.tokens for row in kl} <= {128, 256, 512} and min(row.tokens for row in kl) < 512
    for row in kl:
        assert row.tokens == 512 or row.stderr <= 0.06 * row.value
        if row.tokens == 512:
            assert row == next(
                r for r in whole.rows if (r.layer, r.attention, r.ffn, r.metric) == (row.layer, row.attention, row.ffn, "kl")
            )


def test_an_error_is_settled_relative_to_the_mean_and_not_from_few_sequences():
    assert is_precise((1.0, 1.1) * 4, 0.05) and not is_precise((1.0, 1.1), 0.05)
    assert not is_precise((1.0, -1.0) * 8, 0.05) and not is_precise((0.0, 2.0) * 8, 0.05)


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

    step = Store(str(tmp_path)).artifact("scores", {}, {})
    arguments = (stack, BATCHES, space, ScoringConfig(granularity="block"), step, states_of, Quiet())
    with pytest.raises(KeyboardInterrupt):
        score_serially(*arguments)
    scores = score_serially(*arguments)
    counted = {item: asked.count(item) for item in asked}
    assert sum(counted.values()) == 24 + 1 and max(counted.values()) == 2  # only the interrupted one was asked for again
    assert len(scores.rows) == 24 * 7 and step.finished
