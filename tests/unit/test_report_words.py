"""The report's words where there is nothing to show, one of a kind, or two numbers of one name."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from html_page import Page
from report_inputs import SPACE, whole_run

from puzzle_ray.evaluation.tasks import TaskAnswers, compare_tasks
from puzzle_ray.report.markup import percent
from puzzle_ray.report.page import render

RUN = whole_run()


def text_of(run) -> str:
    return Page(render(run)).text


def test_both_places_say_which_tokens_their_agreement_counts():
    """The evaluation's is of every token, that of the tables of those that another one follows: two numbers of one name."""
    from jobs.evaluate_child import agreement_lines

    assert (
        "The last token of each sequence is left out, as nothing follows it; KL and agreement of the evaluation count it."
        in text_of(RUN)
    )
    lines = agreement_lines(RUN.quality)
    assert lines[0].endswith("(KL and agreement above count it):") and lines[1].startswith("position")


def test_a_share_without_an_interval_says_why():
    own = [1.0, 0.0, 1.0, 1.0]
    model = TaskAnswers({"a": {"acc,none": own}}, {"a": {"acc,none": 0.75}})
    found = compare_tasks({"a": ["a"]}, dict.fromkeys(("parent", "child"), model), {}, 0, 200, 0.9)
    text = text_of(replace(RUN, quality=RUN.quality | {"tasks": RUN.quality["tasks"] | found}))
    assert f"kept {percent(1.0)} (no interval: parent and child differ in no question)" in text
    assert text.count("no interval: parent and child differ in no question") == 2, "in the table and among the main figures"
    found = compare_tasks({"a": ["a"]}, dict.fromkeys(("parent", "child"), model), {"a": 0.8}, 0, 200, 0.9)
    text = text_of(replace(RUN, quality=RUN.quality | {"tasks": RUN.quality["tasks"] | found}))
    assert "differ in no question; the parent is not above guessing (80.0%)" in text, "what was kept is what guessing gives"


def test_an_answer_without_text_and_a_single_question_are_said_as_such():
    sample = {"prompt": "Begin", "text": "", "models": {"parent": "", "child": " on"}, "same_tokens": {"parent": 1, "child": 0}}
    row = RUN.quality["retrieval"][0] | {"questions": 1}
    text = text_of(replace(RUN, quality=RUN.quality | {"samples": [sample], "retrieval": [row]}))
    assert "nothing: the answer ends at once" in text and "1 question" in text and "1 questions" not in text


def test_names_of_limits_have_room():
    """`params_fraction 0.7` stood in five lines of four letters."""
    page = render(RUN)
    assert '<table class="budgets">' in page and ".budgets tbody th { min-width: 5em; }" in page


def test_a_pick_that_is_not_the_least_sum_of_scores_says_by_what_it_was_picked():
    assert RUN.architecture is not None
    picked = replace(RUN.architecture, status="measured", bound=RUN.architecture.objective / 2)
    assert "picked by measured KL; no answer's sum is below" in text_of(replace(RUN, architecture=picked))
    assert "the best that was found in time; no" in text_of(replace(RUN, architecture=replace(picked, status="feasible")))


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neo", "llama"])
def test_the_first_page_knows_a_parents_sizes_by_whatever_names_its_family_has_for_them(family):
    """It is made before anything asks for the search space, which writes them into the config."""
    from transformers import AutoConfig

    from jobs.stages.report import PARTS
    from puzzle_ray.families.registry import ffn_width

    config = AutoConfig.for_model(family)
    run = SimpleNamespace(parent=SimpleNamespace(model_config=config), content=lambda _: SimpleNamespace(facts=dict), space=SPACE)
    found = PARTS["tokens"](run)
    assert found["num_key_value_heads"] == config.num_attention_heads and found["intermediate_size"] == ffn_width(config)
