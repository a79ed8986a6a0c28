"""An answer never rests on estimates: what it uses is scored, and searched again, and little else is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_inputs import PROFILE, SCENARIO, SCORES, SPACE

from jobs.run import Run
from jobs.stages import scores
from puzzle_ray.artifacts import LayerChoice, ScoreRow, Scores
from puzzle_ray.config import load
from puzzle_ray.errors import Infeasible
from puzzle_ray.scoring.exact import estimated_replacements, exact_where_used, with_lowered_estimates
from puzzle_ray.scoring.replacements import Replacement
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.tables import search_architectures

TRUTH = {(row.layer, row.attention, row.ffn): row for row in SCORES.rows}


def shortlisted(noise: float, share: float, seed: int) -> Scores:
    """The scores with Fisher estimates that are off by a lognormal factor, and a share of the exact ones."""
    rng, rows = np.random.default_rng(seed), []
    for key, row in TRUTH.items():
        estimate = 0.3 * row.value**0.8 * float(rng.lognormal(0, noise))
        known = rng.random() < share
        rows.append(row if known else ScoreRow(*key, "kl", estimate, 0.0, 0))
        rows.append(ScoreRow(*key, "fisher", estimate, 0.0, 100))
    return Scores(tuple(rows), "block")


def settled(scores: Scores, speedup: float) -> tuple[Scores, list[Replacement]]:
    asked: list[Replacement] = []

    def answers(seen):
        return [a.choices for a in search_architectures(SPACE, seen, PROFILE, SCENARIO, Limits(speedup=speedup))]

    def score(items):
        asked.extend(items)
        return [TRUTH[item.layer, item.choice.attention, item.choice.ffn] for item in items]

    return exact_where_used(scores, "kl", answers, score), asked


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000), st.sampled_from([1.2, 1.5, 2.0, 2.5]))
@settings(max_examples=40, deadline=None)
def test_every_answer_is_exact_and_nothing_is_scored_twice(noise, share, seed, speedup):
    scores = shortlisted(noise, share, seed)
    found, asked = settled(scores, speedup)
    answer = search_architectures(SPACE, found, PROFILE, SCENARIO, Limits(speedup=speedup))[0]
    assert estimated_replacements(found, "kl", [answer.choices]) == []
    assert answer.objective == pytest.approx(sum(SCORES.value(i, c, "kl") for i, c in enumerate(answer.choices)))
    assert len(asked) == len(set(asked))
    assert all(not scores.parts(item.layer, item.choice, "kl")[0].tokens for item in asked), "only estimates are scored"
    low = {(row.layer, row.attention, row.ffn): row for row in found.rows if row.metric == "kl" and not row.tokens}
    if all(row.value <= TRUTH[key].value for key, row in low.items()):
        assert answer.objective == pytest.approx(
            search_architectures(SPACE, SCORES, PROFILE, SCENARIO, Limits(speedup=speedup))[0].objective
        )


def test_good_estimates_give_the_exact_answer_for_a_few_scores():
    exact = search_architectures(SPACE, SCORES, PROFILE, SCENARIO, Limits(speedup=1.5))[0]
    for seed in range(10):
        found, asked = settled(shortlisted(0.1, 0.2, seed), 1.5)
        assert search_architectures(SPACE, found, PROFILE, SCENARIO, Limits(speedup=1.5))[0].choices == exact.choices
        assert len(asked) < 0.7 * len(TRUTH)


def test_what_is_not_scored_is_below_its_calibrated_estimate():
    scores = shortlisted(0.3, 0.5, 3)
    seen = with_lowered_estimates(scores, "kl")
    exact = [row for row in scores.rows if row.metric == "kl" and row.tokens]
    assert all(row in seen.rows for row in exact) and len(seen.rows) == len(scores.rows)
    for row in (row for row in seen.rows if row.metric == "kl" and not row.tokens):
        assert 0 < row.value < 0.5 * TRUTH[row.layer, row.attention, row.ffn].value * np.exp(4 * 0.3)
    assert estimated_replacements(seen, "kl", [(LayerChoice(),) * 4]) == [], "the parent's own blocks need no score"


def test_an_impossible_budget_is_said_and_nothing_is_scored():
    asked = []
    with pytest.raises(Infeasible):
        exact_where_used(
            shortlisted(0.3, 0.5, 1),
            "kl",
            lambda seen: [a.choices for a in search_architectures(SPACE, seen, PROFILE, SCENARIO, Limits(speedup=1000))],
            lambda items: asked.extend(items) or [],
        )
    assert asked == []


def test_what_is_settled_keys_a_search_only_where_there_is_a_shortlist():
    def key_part(*overrides):
        return scores.identity(Run(load(None, None, overrides)))

    assert key_part("scoring.shortlist_settle=false") == key_part()
    fisher = "scoring.shortlist=fisher"
    assert key_part(fisher, "scoring.shortlist_settle=false") != key_part(fisher)
