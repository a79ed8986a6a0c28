"""Predictions corrected by measured children: against least squares, against brute force, and what a pick does with them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from picking_problem import LAYERS, LIMITS, TABLES, Meter, cost, true_kl

from puzzle_ray.artifacts import Measured
from puzzle_ray.errors import Infeasible
from puzzle_ray.search.correction import Correction, best_unmeasured
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.pick import PickOptions, pick
from puzzle_ray.search.searcher import Options
from puzzle_ray.search.settings import SearchConfig
from puzzle_ray.search.tables import Tables

(WITHIN,) = TABLES.within(LIMITS)


def some_answers(count: int):
    return TABLES.search(LIMITS, count=count)


def run(meter=None, **how):
    meter = meter or Meter()
    architecture, report = pick(TABLES, LIMITS, PickOptions(**how), Options(), meter)
    return architecture, report, meter


def test_one_child_says_its_ratio_of_all_others():
    first, *others = some_answers(6)
    found = Correction.fitted([(first, 1.7 * first.architecture.objective)])
    for answer in (first, *others):
        assert found.kl(answer) == pytest.approx(1.7 * answer.architecture.objective)


def test_the_fit_is_the_least_squares_fit_of_a_common_ratio_and_small_parts_of_blocks_and_children():
    """The same by lstsq over all unknowns: every block's part, every child's own part, both small, and the ratio, which is free."""
    answers = some_answers(7)
    kls = [
        answer.architecture.objective * ratio for answer, ratio in zip(answers, (1.5, 1.1, 1.4, 1.9, 1.0, 1.3, 1.2), strict=True)
    ]
    score = answers[0].table.problem.score
    rows, ratios = [], []
    for answer, kl in zip(answers, kls, strict=True):
        share = np.zeros_like(score)
        at = np.arange(LAYERS), answer.choice
        share[at] = score[at] / score[at].sum()
        rows.append([1.0, *share.ravel()])
        ratios.append(kl / answer.architecture.objective)
    small = np.concatenate([np.zeros((score.size, 1)), np.eye(score.size)], axis=1)
    solved = np.linalg.lstsq(np.concatenate([rows, small]), np.array([*ratios, *np.zeros(score.size)]), rcond=None)[0]
    found = Correction.fitted(list(zip(answers, kls, strict=True)))
    assert found.factors == pytest.approx(solved[0] + solved[1:].reshape(score.shape))
    again = Correction.fitted(list(zip(answers, kls, strict=True))[::-1])
    assert again.factors == pytest.approx(found.factors), "the order of the children says nothing"


def test_a_block_of_the_worse_child_is_predicted_worse_than_one_that_no_child_has():
    good, bad = some_answers(2)
    found = Correction.fitted([(good, good.architecture.objective), (bad, 2 * bad.architecture.objective)])
    (layer,) = np.flatnonzero(good.choice != bad.choice)[:1]
    unseen = next(v for v in range(found.factors.shape[1]) if v not in (good.choice[layer], bad.choice[layer]))
    factor = found.factors[layer]
    assert factor[good.choice[layer]] <= factor[unseen] <= factor[bad.choice[layer]] and factor.min() < factor.max()


def test_children_that_say_nothing_are_left_out_of_the_fit():
    first, second = some_answers(2)
    plain = Correction.fitted([(first, 3.0)])
    assert Correction.fitted([(second, math.nan), (first, 3.0)]).factors == pytest.approx(plain.factors)
    assert Correction.fitted([(first, math.inf)]) is None


def test_the_answer_to_corrected_scores_is_the_best_of_all_that_are_not_measured():
    """By brute force over all architectures within the budget."""
    measured = some_answers(3)
    found = Correction.fitted([(a, true_kl(a.architecture.choices)) for a in measured])
    known = [a.architecture.choices for a in measured]
    best = best_unmeasured(TABLES, LIMITS, "mip", Options(), found, known)
    corrected = found.scores(WITHIN.problem)
    sums = {}
    for choice in itertools.product(range(corrected.shape[1]), repeat=LAYERS):
        if not WITHIN.problem.violated(np.array(choice)) and WITHIN.named(np.array(choice)) not in known:
            sums[choice] = corrected[np.arange(LAYERS), choice].sum()
    assert found.kl(best) == pytest.approx(min(sums.values()))
    assert best.architecture.objective == WITHIN.problem.objective(best.choice) and best.architecture.choices not in known
    assert best.architecture.limits == measured[0].architecture.limits and best.table.problem.limits == WITHIN.problem.limits
    nothing_left = Limits(latency_ms=1.0)  # but no attention and no FFN anywhere
    (only,) = TABLES.search(nothing_left)
    with pytest.raises(Infeasible):
        best_unmeasured(TABLES, nothing_left, "mip", Options(), found, [only.architecture.choices])


def test_answers_that_are_predicted_far_above_the_least_are_left_out_and_the_first_two_never():
    plain, every, _ = run(count=8)
    least = min(row["kl"] for row in every["candidates"][:2])
    for within in (1.0, 1.1, 1.5, 100.0):
        _, report, meter = run(count=8, predicted_within=within)
        origins = [row["origin"] for row in report["candidates"]]
        assert origins[:2] == ["mip", "mip #2"] and len(meter.asked) == len(origins)
        assert set(origins) | set(report["left_out"]) == {row["origin"] for row in every["candidates"]}
        assert not set(origins) & set(report["left_out"])
        assert all(row["predicted_corrected"] <= within * least for row in report["candidates"][2:])
    assert origins == [row["origin"] for row in every["candidates"]] and report["picked"]["kl"] == true_kl(plain.choices)
    _, report, _ = run(count=8, predicted_within=1.0)
    assert report["left_out"] and all("predicted KL" in why for why in report["left_out"].values())


def test_corrected_scores_find_what_the_sums_hide():
    """Where all good sums lose the attention of neighbours, a child without such neighbours is found by few more measured children."""
    plain, before, _ = run(count=2)
    found, report, meter = run(count=2, corrections=6)
    assert true_kl(found.choices) <= true_kl(plain.choices) and cost(found.choices) <= 20.0
    assert len(meter.asked) == len(set(meter.asked)) <= 8, "a child is measured once"
    names = [row["origin"] for row in report["candidates"]]
    assert names[:3] == ["mip", "mip #2", "mip, corrected"]
    better = [row["kl"] for row in report["candidates"]]
    for number, row in enumerate(report["candidates"][2:], 2):  # it goes on while one is better, or predicted to be
        least = min(better[:number])
        assert row["predicted_corrected"] < least or number == 2 or better[number - 1] < min(better[: number - 1])
    assert found.bound <= found.objective and found.status == ("optimal" if found.choices == plain.choices else "measured")


def test_scores_that_are_not_far_off_are_not_corrected_for_nothing():
    """Sums that are true: the answer to corrected scores is predicted no better, so it is not measured."""

    class Additive(Meter):
        def __call__(self, children):
            super().__call__(children)
            sums = [sum(WITHIN.problem.score[row, WITHIN.choices[row].index(c)] for row, c in enumerate(x)) for x in children]
            return [Measured(1.3 * kl, 0.0, 0.0, 1.0, 10) for kl in sums]

    _, report, meter = run(Additive(), count=3, corrections=4, rivals_from=2.0, rivals=("greedy",))
    assert len(meter.asked) == 3 and "not below the least" in report["left_out"]["mip, corrected"]
    _, report, meter = run(Additive(), count=3, corrections=4, rivals_from=1.2)
    assert len(meter.asked) == 4, "far off, one is measured, and it is not better"


def test_a_child_whose_kl_is_no_number_corrects_nothing():
    class Broken(Meter):
        def __call__(self, children):
            return [replace(m, kl=math.nan) for m in super().__call__(children)]

    _, report, meter = run(Broken(), count=3, corrections=4, predicted_within=1.15)
    assert len(meter.asked) == 3 and not report["left_out"]


def test_a_searcher_that_gives_its_answers_again_is_not_asked_for_ever(monkeypatch):
    first, second = some_answers(2)
    monkeypatch.setattr(Tables, "answers", lambda *_: itertools.cycle([first, second]))
    _, report, meter = run(count=2, corrections=4)
    assert len(meter.asked) == 2 and "gave 3 answers, of which none is new" in report["left_out"]["mip, corrected"]


def test_the_key_says_what_may_change_the_pick():
    """Without both, a pick is what it was before there was any correction, and so is its key."""
    plain = SearchConfig(candidates=3, corrections=0, predicted_within=None)
    assert not {"corrections", "predicted_within"} & set(plain.identity())
    found = SearchConfig(candidates=3).identity()
    assert (found["corrections"], found["predicted_within"]) == (4, 1.15)
    for same in (SearchConfig(), SearchConfig(candidates=3, distil_tokens=100)):  # nothing is measured, or all is distilled
        assert not {"corrections", "predicted_within"} & set(same.identity())
