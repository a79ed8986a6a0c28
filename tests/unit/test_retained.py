"""What was kept of the parent's answers: exact values, intervals that cover the truth, and pairs that stay together."""

from types import SimpleNamespace

import numpy as np
import pytest

from puzzle_ray.evaluation.retained import Paired, retained
from puzzle_ray.evaluation.tasks import TaskAnswers, compare_tasks, task_lines, values_of

HOW = {"seed": 0, "resamples": 4000, "confidence": 0.95}


def answers(count, right, seed=0):
    values = np.zeros(count)
    values[np.random.default_rng(seed).permutation(count)[:right]] = 1.0
    return values.tolist()


def test_the_same_answers_are_kept_whole_and_have_no_interval():
    """Every draw says 100 %, which says nothing of questions that were not asked: `100 % to 100 %` would look like certainty."""
    own = answers(100, 60)
    for kept in retained({"a": [Paired(own, own, 0.25)], "b": [Paired(own, own)]}, **HOW).values():
        assert (kept.retained.value, kept.retained.low, kept.retained.high) == (1.0, None, None)
        assert (kept.difference.value, kept.difference.low, kept.difference.high) == (0.0, None, None)
        assert kept.parent.value == 0.6 and kept.parent.low < 0.6 < kept.parent.high
    above = retained({"a": [Paired(own, own, 0.25)]}, **HOW)["a"].above_chance
    assert (above.value, above.low) == (1.0, None)
    model = TaskAnswers({"a": {"acc,none": own}}, {"a": {}})
    found = compare_tasks({"a": ["a"]}, {"parent": model, "child": model}, {"a": 0.25}, 0, 200, 0.9)
    assert "100.0% (no interval: parent and child differ in no question); 100.0% of what is" in task_lines(found)[-1]
    worse = retained({"a": [Paired([1.0] * 30, [1.0] * 20 + [0.0] * 10, 0.25)]}, **HOW)["a"]
    assert worse.retained.low < 2 / 3 < worse.retained.high and worse.above_chance.low is not None, (
        "though the parent's is one value"
    )


def test_a_child_that_is_right_in_no_question_has_no_interval_either():
    """`0.0% (0.0% to 0.0%)` looked like certainty."""
    parent, wrong = answers(100, 60), [0.0] * 100
    kept = retained({"a": [Paired(parent, wrong, 0.25)]}, **HOW)["a"]
    assert (kept.child.value, kept.child.low, kept.retained.value, kept.retained.low) == (0.0, None, 0.0, None)
    assert kept.difference.low < -0.6 < kept.difference.high and kept.above_chance.low is not None
    models = {
        "parent": TaskAnswers({"a": {"acc,none": parent}}, {"a": {}}),
        "child": TaskAnswers({"a": {"acc,none": wrong}}, {"a": {}}),
    }
    assert (
        "0.0% (no interval: the child is right in no question)"
        in task_lines(compare_tasks({"a": ["a"]}, models, {}, 0, 200, 0.9))[-1]
    )
    right = retained({"a": [Paired(parent, [1.0] * 100)]}, **HOW)["a"]
    assert right.child.low is None and right.retained.low < 1 / 0.6 < right.retained.high


def test_a_child_that_is_right_in_all_is_not_said_to_be_right_in_none():
    """Some draws have no question that the parent, right in 1 of 8, is right in: that is why there is no interval."""
    models = {
        "parent": TaskAnswers({"a": {"acc,none": [1.0] + [0.0] * 7}}, {"a": {}}),
        "child": TaskAnswers({"a": {"acc,none": [1.0] * 8}}, {"a": {}}),
    }
    line = task_lines(compare_tasks({"a": ["a"]}, models, {}, 0, 200, 0.9))[-1]
    assert "(no interval: the parent is too close to 0)" in line


def test_pairs_stay_together():
    """A child that only loses 5 of 100 questions: were the pairs torn apart, the interval would be about three times as wide."""
    parent = answers(100, 60)
    child = list(parent)
    for number in [i for i, value in enumerate(parent) if value][:5]:
        child[number] = 0.0
    paired = retained({"a": [Paired(parent, child)]}, **HOW)["a"].difference
    torn = retained({"a": [Paired(parent, answers(100, 55, seed=1))]}, **HOW)["a"].difference
    assert paired.value == torn.value == pytest.approx(-0.05)
    exact = 1.96 * (0.05 * 0.95 / 100) ** 0.5  # of a loss in 5 % of the questions
    assert paired.high - paired.low == pytest.approx(2 * exact, rel=0.25) and torn.high - torn.low > 2 * (
        paired.high - paired.low
    )


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator, covered = np.random.default_rng(0), 0
    for number in range(200):
        parent = generator.random(150) < 0.7
        child = np.where(generator.random(150) < 0.8, parent, generator.random(150) < 0.3)
        kept = retained({"a": [Paired(parent.astype(float).tolist(), child.astype(float).tolist())]}, number, 500, 0.9)["a"]
        covered += kept.retained.low <= (0.8 * 0.7 + 0.2 * 0.3) / 0.7 <= kept.retained.high
    assert 0.83 <= covered / 200 <= 0.97


def test_entries_count_once_and_their_tasks_by_questions():
    big, small = Paired([1.0] * 30, [0.0] * 15 + [1.0] * 15), Paired([1.0] * 10, [1.0] * 10)
    found = retained({"both": [big, small], "one": [small]}, **HOW)
    assert found["both"].child.value == 25 / 40 and found["both"].questions == 40
    assert found[""].child.value == pytest.approx((25 / 40 + 1) / 2) and found[""].questions == 50
    drawn = found["both"].child  # `small` adds no doubt: only draws of `big` differ
    assert drawn.high - drawn.low < 0.75 * 2 * 1.96 * (0.25 / 30) ** 0.5 * 1.2


def test_what_cannot_be_said_is_not_said():
    none = retained({"a": [Paired([0.0] * 20, [1.0] * 20)]}, **HOW)["a"]
    assert none.retained is None and none.difference.value == 1.0
    rare = retained({"a": [Paired([1.0] + [0.0] * 19, [1.0] + [0.0] * 19)]}, **HOW)["a"]
    assert rare.retained.value == 1.0 and rare.retained.low is None, "draws without the one question have no ratio"
    guessing = retained({"a": [Paired(answers(100, 27), answers(100, 25), 0.25)]}, **HOW)["a"]
    assert guessing.above_chance is None and guessing.retained.value == pytest.approx(25 / 27)
    with pytest.raises(ValueError, match="3 values of the parent and 2"):
        Paired([1.0, 0.0, 1.0], [1.0, 0.0])


def test_questions_that_were_answered_alike_have_no_interval():
    """Every draw of one question is that question: an interval without width would look like certainty."""
    one = retained({"a": [Paired([1.0], [1.0], 0.25)]}, **HOW)["a"]
    for found in (one.parent, one.child, one.difference, one.retained):
        assert found.low is None and found.high is None
    assert one.retained.value == 1.0 and one.above_chance is None, "one of four right is what guessing gives, too"
    many = retained({"a": [Paired([1.0] * 20, [1.0] * 20, 0.25)]}, **HOW)["a"]
    assert many.above_chance.value == 1.0 and many.above_chance.low is None and many.retained.low is None
    model = TaskAnswers({"a": {"acc,none": [1.0]}}, {"a": {}})
    found = compare_tasks({"a": ["a"]}, {"parent": model, "child": model}, {"a": 0.25}, 0, 200, 0.9)
    assert task_lines(found)[-1].endswith(
        "100.0% (no interval: one question); too few questions to tell the parent from guessing (25.0%)"
    )
    both = {"one": [Paired([1.0], [1.0], 0.25)], "a": [Paired(answers(100, 60), answers(100, 50), 0.25)]}
    mean = retained(both, **HOW)[""]
    assert mean.retained.value == pytest.approx(1.5 / 1.6) and mean.retained.low is None and mean.parent.low is None
    none = retained({"a": [Paired([0.0] * 20, [0.0] * 20, 0.25)]}, **HOW)["a"]
    assert none.above_chance is None and none.retained is None


def test_draws_are_a_function_of_the_seed():
    pair = {"a": [Paired(answers(80, 50), answers(80, 45, seed=3))]}
    assert retained(pair, **HOW) == retained(pair, **HOW) != retained(pair, **HOW | {"seed": 1})
    continuous = np.random.default_rng(0).normal(1, 0.1, (2, 50)).tolist()
    kept = retained({"a": [Paired(*continuous)]}, **HOW)["a"].retained
    assert kept.value == pytest.approx(np.mean(continuous[1]) / np.mean(continuous[0])) and kept.low < kept.value < kept.high


def test_the_metric_that_stands_for_an_entry_is_one_that_all_its_tasks_have():
    values = {"acc,none": [1.0, 0.0], "acc_norm,none": [1.0, 1.0]}
    model = TaskAnswers({"a": values, "b": {"acc,none": [1.0]}, "c": {}}, {"c": {"perplexity,none": 3.0}, "a": {}, "b": {}})
    worse = TaskAnswers(
        {"a": values | {"acc_norm,none": [1.0, 0.0]}, "b": {"acc,none": [0.0]}, "c": {}},
        model.figures | {"c": {"perplexity,none": 4.0}},
    )
    entries = {"both": ["a", "b"], "a": ["a"], "c": ["c"]}
    found = compare_tasks(entries, {"parent": model, "child": worse}, {"a": 0.5, "b": 0.5}, 0, 200, 0.9)
    both, alone = found["entries"]
    assert (both["metric"], alone["metric"]) == ("acc", "acc_norm")
    assert both["models"]["child"]["retained"]["value"] == 0.5 and alone["models"]["child"]["retained"]["value"] == 0.5
    assert found["figures"]["c"] == {"perplexity,none": {"parent": 3.0, "child": 4.0}}
    assert len(task_lines(found)) == 4 and task_lines(found)[-1].startswith("mean")
    assert compare_tasks({"c": ["c"]}, {"parent": model, "child": worse}, {}, 0, 200, 0.9)["mean"] is None


def test_a_metric_of_which_less_is_better_is_no_share_that_was_kept():
    """lm_eval's crows_pairs has two such means: a child with more stereotypes than its parent has not kept more than all."""

    def mean(values):
        return sum(values) / len(values)

    of_task = {"acc": True, "pct_stereotype": False}
    task = SimpleNamespace(aggregation=lambda: dict.fromkeys(of_task, mean), higher_is_better=lambda: of_task)
    samples = [{"doc_id": n, "filter": "none", "metrics": list(of_task), "acc": n, "pct_stereotype": 1.0} for n in (1, 0)]
    assert values_of(task, samples) == {"acc,none": [0.0, 1.0]}
