"""The report: what a reader must find on it, and that nothing a model wrote can become markup."""

from __future__ import annotations

import dataclasses
import html
import math
import re
from dataclasses import replace

import pytest
from html_page import Page
from report_inputs import (
    CHOSEN,
    LAYERS,
    PAIRS,
    PICK,
    PROFILE,
    SAMPLE,
    SCORES,
    SPACE,
    SWEEP,
    WHY_UNTIMED,
    Trained,
    measured_run,
    untimed,
    whole_run,
)

from puzzle_ray.artifacts import (
    KINDS,
    PARENT,
    LayerChoice,
    LayerSpace,
    ScoreRow,
    Scores,
    SearchSpace,
)
from puzzle_ray.report.contents import UNITS
from puzzle_ray.report.markup import number, percent
from puzzle_ray.report.page import SECTIONS, ReportData, SweepPoint, render
from puzzle_ray.report.summary import summary
from puzzle_ray.search.interactions import NOT_MEASURED
from puzzle_ray.search.measured import measured_kls

WHOLE = render(whole_run())
PAGE = Page(WHOLE)


def test_whole_run_is_one_well_formed_document_with_every_section():
    assert WHOLE.startswith("<!DOCTYPE html>\n<html")
    assert PAGE.faults == []
    assert [s["id"] for s in PAGE.all("section")] == [name for name, *_ in SECTIONS]
    assert [a["href"] for a in PAGE.all("a")] == [f"#{name}" for name, *_ in SECTIONS]
    assert len(WHOLE) < 300_000


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ReportData) if f.name != "parent"])
def test_any_part_of_a_run_may_be_missing(name):
    field = next(f for f in dataclasses.fields(ReportData) if f.name == name)
    empty = field.default_factory() if field.default is dataclasses.MISSING else field.default
    assert Page(render(replace(whole_run(), **{name: empty}))).faults == []


def test_a_run_that_did_nothing_yet_names_what_would_fill_the_page():
    page = Page(render(ReportData("some-parent")))
    assert page.faults == []
    assert [s["id"] for s in page.all("section")] == ["missing"]
    for _, title, _, needs in SECTIONS:
        assert not needs or f"{title}: needs {needs}" in page.text


def test_every_source_of_text_is_there_with_what_was_taken_of_it():
    section = WHOLE[WHOLE.index('id="text"') :]
    section = re.sub("<[^>]+>", "|", section[: section.index("</section>")])
    words = [cell for cell in section.split("|") if cell.strip()]
    first = words.index("books/&lt;b&gt;.txt ")
    words = words[first:]
    taken = ["700,000 ", "74.5\xa0% of training", " 51,000 ", "85.0\xa0% of held-out text"]
    assert words[:9] == ["books/&lt;b&gt;.txt ", "training, weight 3", "1,200", *taken, "–", "no"]
    taken = ["240,000 ", "25.5\xa0% of training", " 9,000 ", "15.0\xa0% of held-out text"]
    assert words[9:18] == ["org/wiki ", "training, weight 1", "340", *taken, "17 rows, 1 file", "2 times"]


def test_headline_has_measured_and_predicted_speedup_loss_params_and_memory():
    cards = WHOLE[WHOLE.index('class="cards"') : WHOLE.index("<nav>")]
    was, now = CHOSEN.parent_predicted, CHOSEN.predicted
    for text in (
        f"{1.031 / 1.037 * CHOSEN.predicted_speedup:.2f}", f"predicted {CHOSEN.predicted_speedup:.2f}", "asked 1.5",
        "2.39 → 2.45", "+0.057", "2.91 before GKD", "87.1", f"{was.num_params / 1e6:.2f} → {now.num_params / 1e6:.2f}",
        f"{was.memory_mib:.1f} → {now.memory_mib:.1f}",
    ):  # fmt: skip
        assert text in cards


def test_a_child_at_another_batch_size_than_the_parent_says_so_wherever_costs_stand_side_by_side():
    architecture = replace(CHOSEN, predicted=replace(CHOSEN.predicted, batch_size=64))
    size = CHOSEN.parent_predicted.batch_size
    evaluation = whole_run().evaluation
    models = {name: model | {"batch_size": size if name == "parent" else 64.0} for name, model in evaluation["models"].items()}
    sweep = (SweepPoint(1.5, architecture),)
    page = Page(render(replace(whole_run(), architecture=architecture, sweep=sweep, evaluation=evaluation | {"models": models})))
    assert f"weights and KV cache at batch {size} and 64" in page.text
    assert f"Parent at batch {size}: runtime, ms" in page.text and "Child at batch 64: runtime, ms" in page.text
    words = [part.strip() for part in page.text.splitlines() if part.strip()]
    row = words.index("Batch size")
    assert words[row + 1 : row + 4] == [f"{size}", "64", "64"]
    assert "batch" in words[words.index("sum of scores") : words.index("params")] and f"{size} there" in words
    alike = Page(render(whole_run())).text
    assert " there\n" not in alike and "Child: runtime, ms" in alike and f"cache at batch {size}\n" in alike


def test_nothing_is_called_measured_that_was_not():
    estimated = replace(
        whole_run(), profile=replace(PROFILE, estimated=True), architecture=replace(CHOSEN, estimated=True), evaluation=None
    )
    page = Page(render(estimated))
    assert "Speed-up, estimated" in page.text
    assert "costs estimated, not measured" in page.text
    assert "not measured yet" in page.text
    assert "Estimated, not measured: torch 2.13.0" in page.text
    assert "Speed-up, measured" not in page.text
    assert "predicted" not in page.text.lower()


def test_speeds_of_a_model_in_shards_are_said_not_to_be_measured():
    run = measured_run()
    page = Page(render(replace(run, evaluation=untimed(run.evaluation))))
    assert page.faults == [] and "Speed-up, measured" not in page.text and "Prefill, tokens/s" not in page.text
    assert page.text.count(WHY_UNTIMED) == 2, "in the headline and under the figures"
    assert "Parameters" in page.text and "Memory: weights and KV cache, MiB" in page.text
    found = summary(replace(run, evaluation=untimed(run.evaluation)))
    assert found["measured_speedup"] is None and found["not_measured"] == WHY_UNTIMED


def test_boxes_are_as_wide_as_what_is_kept():
    box = r'<div class="box[^"]*" title="layer (\d+), (\w+): ([^\n"]+)[^>]*>(?:<i class="(\w+)" style="width:([\d.]+)%">)?'
    boxes = re.findall(box, WHOLE)
    drawn = {(int(layer), kind): (variant, colour, width) for layer, kind, variant, colour, width in boxes}
    assert len(drawn) == 2 * LAYERS
    assert drawn[0, "Attention"] == (PARENT, "attention", "100.0")
    assert drawn[1, "Attention"] == ("gqa:2", "attention", "50.0")  # 2 of 4 KV heads
    assert drawn[3, "FFN"] == ("ffn:128", "ffn", "25.0")  # of 512 channels
    assert drawn[4, "FFN"] == ("linear", "linear", "20.0")  # its parameters
    assert drawn[5, "Attention"] == ("noop", "", "")


def test_every_score_and_every_trained_variant_has_a_cell_and_the_chosen_are_framed():
    heat = [cell for cell in PAGE.all("td") if cell.get("style", "").startswith("--heat")]
    subblocks = list(SPACE.subblocks())
    assert len(heat) == 2 * len(subblocks)
    replaced = sum(choice.variant(kind) != PARENT for choice in CHOSEN.choices for kind in KINDS)
    assert len([cell for cell in heat if cell.get("class") == "framed"]) == 2 * replaced
    heats = [int(re.fullmatch(r"--heat:(\d+)%", cell["style"])[1]) for cell in heat[: len(subblocks)]]
    assert (min(heats), max(heats)) == (0, 100)
    values = [SCORES.value(i, LayerChoice(ffn="noop"), "kl") for i in range(LAYERS)]
    assert number(max(values), 2) in PAGE.text


def test_infeasible_budgets_are_said():
    assert "none: no architecture in this search space meets speedup >= 9; the best reachable is 7.4" in PAGE.text
    assert len(PAGE.all("path", "cross")) == 1
    assert len(PAGE.all("circle", "point")) == 4
    assert len(PAGE.all("circle", "chosen-dot")) == 1


def test_a_sweep_over_other_budgets_than_speed_names_them():
    points = (SweepPoint(None, CHOSEN, None, "memory_mib 100"), SweepPoint(None, None, "too little", "memory_mib 1"))
    text = render(ReportData("p", sweep=points))
    assert "asked memory_mib 100: " in text and "asked memory_mib 1: too little" in text
    assert "asked 1.5\u00a0×: " in render(ReportData("p", sweep=(SweepPoint(1.5, CHOSEN, None, "1.5 x"),)))


def test_a_sweep_without_any_answer_still_says_why():
    page = Page(render(ReportData("p", sweep=(SweepPoint(9.0, None, "the best reachable is 7.4"),))))
    assert page.faults == []
    assert "none: the best reachable is 7.4" in page.text


def test_a_measured_kl_is_drawn_in_place_of_the_sum_of_scores():
    page = Page(render(measured_run()))
    assert page.faults == []
    assert len(page.all("circle", "point")) == len(page.all("path", "distilled")) == 4
    assert not page.all("circle", "predicted")
    assert "answer to a budget: measured KL of the whole child" in page.text and "measured KL after GKD" in page.text
    assert "measured KL 0.0874" in page.text and "KL 0.0350 after GKD" in page.text
    places = {circle["cy"] for circle in page.all("circle", "point")}
    assert {circle["cy"] for circle in page.all("circle", "chosen-dot")} <= places


def test_what_was_not_measured_is_told_from_what_was():
    points = [replace(SWEEP[0], measured_kl=0.021), *SWEEP[1:]]
    page = Page(render(replace(whole_run(), sweep=points)))
    assert len(page.all("circle", "point")) == 1 and len(page.all("circle", "predicted")) == 3
    assert "not measured: sum of scores" in page.text
    scores = replace(SCORES, rows=tuple(replace(row, metric="lm_loss") for row in SCORES.rows))
    other = [replace(p, architecture=p.architecture and replace(p.architecture, metric="lm_loss")) for p in points]
    run = replace(whole_run(), sweep=other, scores=scores, architecture=replace(CHOSEN, metric="lm_loss"))
    page = Page(render(run))  # sums of another metric have no place on an axis of KL
    assert len(page.all("circle", "point")) == 1 and not page.all("circle", "predicted")


def test_noise_around_a_kl_of_zero_is_zero_and_an_engine_is_named_once():
    run = whole_run()
    models = {**run.models, "parent": {**run.models["parent"], "kl": -8.51e-11}}
    profile = replace(PROFILE, engine_version="torch 2.13.0, transformers 5.24.0")
    text = render(replace(run, evaluation={**run.evaluation, "models": models}, profile=profile))
    assert "8.51e" not in text
    assert "torch 2.13.0, transformers 5.24.0 on AMD" in text and "torch torch" not in text
    assert "torch 2.13.0 on AMD" in WHOLE


def test_noise_in_scores_and_in_their_sum_is_zero():
    noise, row = -8.51e-11, SCORES.rows[0]
    scores = replace(SCORES, rows=(replace(row, value=noise), *SCORES.rows[1:]))
    chosen = replace(CHOSEN, objective=noise, bound=noise, status="time limit")
    run = replace(whole_run(), scores=scores, architecture=chosen, sweep=[SweepPoint(1.5, chosen)])
    text = render(run)
    assert "8.51" not in text and f"layer 0, {row.attention}: 0 ± " in text
    other = replace(scores, rows=tuple(replace(r, metric="lm_loss") for r in scores.rows))
    text = render(replace(run, scores=other, architecture=replace(chosen, metric="lm_loss"), sweep=()))
    assert "8.51" in text, "a rise of the loss may be negative"


def picked_run(kls):
    """A run whose pick has measured these KLs; the last one is the pick."""
    row = PICK["candidates"][0]
    rows = [row | {"kl": kl, "choices": [c.label for c in choices]} for choices, kl in kls.items()]
    return replace(whole_run(), picked=PICK | {"candidates": rows[:-1], "picked": rows[-1]})


def section_of(page, name):
    section = page[page.index(f'id="{name}"') :]
    return section[: section.index("</section>")]


def test_every_measured_child_stands_beside_what_was_predicted_of_it():
    """The sum of scores, the prediction by the children measured before, where there was one, and the measured KL; by KL."""
    section = section_of(WHOLE, "pick")
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in section.split("<tr>")[2:]]
    sums = [number(row["predicted"]) for row in PICK["candidates"]]
    assert [row[:4] for row in rows] == [
        ["mip, picked", sums[0], "–", "0.541"],
        ["mip, corrected", sums[2], "0.617", "0.687"],
        ["mip #2", sums[1], "–", "0.892"],
    ]
    assert section.count("The corrected prediction of a child was made before it was measured") == 1
    assert NOT_MEASURED in section and "Not measured:" not in section
    plain = [{k: v for k, v in row.items() if k != "predicted_corrected"} for row in PICK["candidates"]]
    assert "orrected prediction" not in render(replace(whole_run(), picked=PICK | {"candidates": plain}))
    drawn = section_of(render(replace(whole_run(), picked=PICK | {"interactions": PAIRS, "left_out": {"greedy": "why"}})), "pick")
    assert NOT_MEASURED not in drawn and "layer 3: linear + ffn:128, layer 4: gqa:1 + linear" in drawn and "0.0742" in drawn
    assert "greedy: why" in drawn


def test_what_the_pick_measured_stands_on_the_frontier_too():
    run = picked_run({SWEEP[3].architecture.choices: 0.25, CHOSEN.choices: 0.0625})
    assert measured_kls({}) == {} and measured_kls(run.picked) == run.measured_kls
    assert run.measured_kls == {SWEEP[3].architecture.choices: 0.25, CHOSEN.choices: 0.0625}
    page = Page(render(run))
    assert page.faults == []
    assert len(page.all("circle", "point")) == len(page.all("circle", "predicted")) == 2
    assert "measured KL 0.250" in page.text and "measured KL 0.0625" in page.text
    alone = Page(render(replace(run, sweep=())))  # a pick without a sweep
    assert "measured KL 0.0625" in alone.text and UNITS["kl"] in alone.text
    assert [row["kl"] for row in summary(run)["frontier"]] == [None, None, 0.0625, 0.25]


def test_what_a_later_round_measured_is_not_said_of_the_originals_children():
    """Names of variants are counted from each round's parent: the same choices are another child, and its KL is to another model."""
    kls = {point.architecture.choices: 0.004321 for point in SWEEP if point.architecture} | {CHOSEN.choices: 0.004321}
    plain = tuple(replace(point, measured_kl=None, distilled_kl=None) for point in SWEEP)
    run = picked_run(kls)
    first, later = (replace(run, sweep=plain, round=number) for number in (1, 2))
    on_chart = [section_of(render(one), "frontier") for one in (first, later)]
    assert "0.00432" in on_chart[0] and "0.00432" not in on_chart[1]
    assert "KL to the child of round 1" in section_of(render(later), "pick")
    assert all(point["kl"] is None for point in summary(later)["frontier"])
    before, after = (run.models[name]["kl"] for name in ("child_before_gkd", "child"))
    page = Page(render(later)).text
    assert f"measured KL {number(before)}" in page and f"KL after GKD, nats per token\n{number(after)}" in page.replace(
        "\n\n", "\n"
    )
    assert "against the child of round 1" in page and "against the child" not in render(first)
    assert "chosen:" not in Page(render(replace(later, evaluation=None))).text, "nothing is known of it that the axis shows"


def test_the_page_says_which_tokens_its_figures_are_from():
    assert "held-out sequences 80 to 99 of 100, by which no block was scored and no child picked" in WHOLE


HOSTILE = """'"><script>alert(1)</script><img src=http://a.b/c onerror=alert(2)>&amp;"""


def _quality_with(text: str) -> dict:
    quality = dict(whole_run().quality)
    quality["tasks"] = quality["tasks"] | {"lm_eval": text, "figures": {text: {text: {"parent": 1.0, text: 2.0}}}}
    quality["tasks"]["entries"] = [row | {"entry": text, "metric": text} for row in quality["tasks"]["entries"]]
    quality["by_position"] = [row | {"bucket": text} for row in quality["by_position"]]
    quality["retrieval"] = [row | {"kind": text} for row in quality["retrieval"]]
    models = {"parent": text, text: f"{text[:5]}{text}"}
    quality["samples"] = [{"prompt": text, "text": text, "models": models, "same_tokens": {"parent": 1, text: 1}}]
    return quality


def _with_texts(text: str) -> ReportData:
    """A run in which every text that comes from outside is `text`."""
    run = whole_run()
    layer = LayerSpace((PARENT, text), (PARENT,))
    choices = (LayerChoice(text),)
    return replace(
        run,
        parent=text,
        space=SearchSpace((layer,)),
        profile=replace(PROFILE, engine=text, engine_version=text, device=text, dtype=text,
                        rows=(*PROFILE.rows, replace(PROFILE.rows[0], variant=text))),
        scores=Scores((ScoreRow(0, text, PARENT, text, 1.0, 0.1, 5),), "subblock"),
        architecture=replace(CHOSEN, choices=choices, searcher=text, status=text, metric=text, limits={text: 1.0}),
        sweep=(SweepPoint(2.0, None, text), SweepPoint(1.5, replace(CHOSEN, status=text))),
        library=[Trained(0, "attention", text, text, 1.0, 0.5, text, 8, text)],
        bld_curves={(0, "attention", text): [1.0, 0.5]},
        evaluation={"models": {"parent": {}, text: {"kl": 1.0}}, "prompt": text, "samples": {text: text}},
        quality=_quality_with(text),
        stage_seconds={text: 1.0}, config_yaml=text, versions={text: text}, machine={text: text},
    )  # fmt: skip


def test_text_never_becomes_markup():
    hostile, harmless = Page(render(_with_texts(HOSTILE))), Page(render(_with_texts("x")))
    assert hostile.faults == []
    assert [(name, list(a)) for name, a in hostile.elements] == [(name, list(a)) for name, a in harmless.elements]
    assert HOSTILE in hostile.text
    assert len(hostile.all("script")) == 1


def test_samples_are_shown_as_written():
    assert html.escape(SAMPLE.removeprefix("Once upon a time")) in WHOLE
    child = SAMPLE.removeprefix("Once upon a time").replace("Lily", "Anna")
    same, other = child.split("Anna")
    assert f"{html.escape(same)}<b>Anna{html.escape(other)}</b>" in WHOLE, "what a child says otherwise is bold"
    assert "<b>Once upon a time</b>" in render(replace(whole_run(), quality=None)), "the evaluation's sample alone"


def test_what_was_kept_has_its_interval_and_says_where_guessing_would_do():
    table = whole_run().quality["tasks"]
    kept = {row["entry"]: row["models"]["child"] for row in table["entries"]}
    for row in kept.values():
        low, high = (percent(row["retained"][bound]) for bound in ("low", "high"))
        assert f"kept {percent(row['retained']['value'])} ({low} to {high})" in WHOLE
    assert kept["arc_easy"]["above_chance"] is None and "parent not above guessing" in PAGE.text
    assert f"{percent(kept['next_sentence_mc']['above_chance']['value'])} of what is above guessing" in PAGE.text


def test_page_asks_for_nothing_from_elsewhere():
    assert "http://" not in WHOLE and "https://" not in WHOLE
    assert "url(" not in WHOLE and "@import" not in WHOLE
    for _, attributes in PAGE.elements:
        assert not attributes.keys() & {"src", "srcset", "xlink:href", "action"}
        assert attributes.get("href", "#").startswith(("#", "data:,"))


def test_pairs_scored_without_their_halves_and_failed_variants_leave_a_page():
    run = whole_run()
    pairs = Scores((ScoreRow(0, "gqa:2", "ffn:384", "kl", 0.1, 0.01, 64),), "block")
    failed = [Trained(0, "ffn", "linear", "least squares", 0.4, math.nan, "start", 64, "loss is not finite")]
    page = Page(render(replace(run, scores=pairs, library=failed, bld_curves={(0, "ffn", "linear"): [0.5, math.nan, math.nan]})))
    assert page.faults == []
    assert "failed" in page.text
    assert "nan" not in re.findall(r"\w+", page.text.lower())
