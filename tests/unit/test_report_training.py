"""What the report says of local distillation beyond the tables of variants: early stops and coupled pairs."""

import html
import re
from dataclasses import replace

from puzzle_ray.artifacts import BLOCK, PARENT, Architecture, Costs, LayerChoice, LayerSpace, SearchSpace
from puzzle_ray.distill.bld import LibraryRow
from puzzle_ray.report.page import ReportData, render
from puzzle_ray.report.training import distillation_details

SPACE = SearchSpace((LayerSpace((PARENT, "gqa:2", "noop"), (PARENT, "ffn:64")),) * 2)
COUPLED = SearchSpace(tuple(replace(layer, coupled=True) for layer in SPACE.layers))
COSTS = Costs(1, 1.0, 1.0, 1.0, 1.0, 1.0, 1)


def trained(space, **changes) -> ReportData:
    rows = [LibraryRow(*entry, "how", 0.5, 0.25, "trained", 1000, "") for entry in space.entries()]
    curves = {(r.layer, r.kind, r.variant): [0.5, 0.3, 0.25] for r in rows}
    return replace(ReportData("p", space=space, library=rows, bld_curves=curves), **changes)


def text(data) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", "".join(distillation_details(data))))


def test_early_stops_are_counted_with_what_they_spared():
    data = trained(SPACE)
    assert "stopped early" not in text(data)
    rows = list(data.library)
    rows[0] = replace(rows[0], tokens=400, tokens_saved=600)
    rows[3] = replace(rows[3], tokens=0)
    said = text(replace(data, library=rows))
    assert "1 of 5 stopped early, since their loss was flat. 600 tokens were saved, 12.0\u00a0% of the training." in said


def test_coupled_pairs_have_a_table_and_a_panel_per_layer():
    chosen = (LayerChoice("gqa:2", "ffn:64"), LayerChoice())
    architecture = Architecture(chosen, "mip", 0, 0, "optimal", 0, COSTS, COSTS)
    page = render(trained(COUPLED, architecture=architecture))
    names = re.findall(r'<th scope="row">(layer \d · [^<]*)</th>', page)
    assert names[0] == "layer 0 · parent + ffn:64" and len(names) == 2 * 5
    assert [name for name in names if "chosen" in name] == ["layer 0 · gqa:2 + ffn:64 (chosen)"]
    assert re.findall("<figcaption>(.*?)</figcaption>", page) == ["layer 0", "layer 1"]
    assert len(re.findall("<title>[^<]*: 0.500 → 0.250", page)) == 2 * 5 and "one line per pair" in page
    assert not [entry for entry in SPACE.entries() if entry[1] == BLOCK], "decoupled spaces have none"
    assert "one line per layer" in render(trained(SPACE)) and "Pairs whose halves" not in render(trained(SPACE))


def test_a_pair_that_failed_says_so():
    data = trained(COUPLED)
    rows = [replace(row, failure="the loss is not finite", kept="start") for row in data.library[:1]]
    assert "start: the loss is not finite" in text(replace(data, library=rows))


def test_variants_that_are_less_well_conditioned_than_the_parent_have_a_table():
    usual = {"singular_value": 0.4, "parent_singular_value": 0.39, "sensitivity": 2e-6, "parent_sensitivity": 1e-6}
    data = trained(SPACE)
    rows = [replace(row, **usual) for row in data.library]
    said = text(replace(data, library=rows))
    assert "No variant has a singular value above 5 times the parent's, or a sensitivity above 25 times." in said
    page = render(replace(data, library=rows))
    assert "largest singular value 0.400 (parent 0.390), sensitivity 2e-06 (parent 1e-06)" in page, "every cell says its own"
    rows[1] = replace(rows[1], singular_value=46.7)
    said = " ".join(text(replace(data, library=rows)).split())
    assert "less well-conditioned than the parent" in said and "46.7 0.390 2e-06 1e-06 how" in said
    pairs = trained(COUPLED)
    assert "0.400 (0.390)" in text(replace(pairs, library=[replace(row, **usual) for row in pairs.library]))


def test_global_distillation_says_what_came_of_it_and_which_rates_were_tried():
    curve = [{"step": step, "loss": 0.3, "kl": 0.2, "cosine": 0.1} for step in range(3)]
    facts = {"kept": "start", "heldout_kl_before": 0.25, "heldout_kl": 0.25, "returns": 4}
    page = render(replace(ReportData("p"), gkd_curve=curve, gkd_facts=facts))
    assert "Distillation did not improve the child (held-out KL 0.25): it is published as it was" in page
    trials = [{"rate": 3e-4, "kl": None, "steps": 20}, {"rate": 1e-4, "kl": 0.2, "steps": 20}]
    facts = {
        "kept": "step 3",
        "heldout_kl_before": 0.25,
        "heldout_kl": 0.2,
        "returns": 0,
        "learning_rate": 1e-4,
        "range_test": trials,
    }
    looks = [{"step": 0, "kl": 0.25, "returned": 0}, {"step": 2, "kl": 9.0, "returned": 1}, {"step": 3, "kl": 0.2, "returned": 0}]
    page = render(replace(ReportData("p"), gkd_curve=curve, gkd_facts=facts, gkd_looks=looks))
    assert "Held-out KL 0.25 -&gt; 0.2, weights of step 3; learning rate 0.0001, the best of 2 in a range test." in page
    assert "0.0001 (chosen)" in page and "not finite" in page and "KL on held-out text: 0.250 → 0.200" in page
    settling = [{"step": step, "kl": kl, "returned": int(step == 6)} for step, kl in ((0, 0.25), (2, 0.2), (4, 9.0), (6, 8.0))]
    for more, ends in (([], "0.250 → 0.200"), ([{"step": 4, "kl": 0.1, "returned": 0}], "0.250 → 0.100")):
        page = render(replace(ReportData("p"), gkd_curve=curve, gkd_facts=facts, gkd_looks=[*settling, *more]))
        assert f"KL on held-out text: {ends}" in page, "neither what it went back from nor what was before that is drawn"
    assert "Global distillation: needs GKD" in render(ReportData("p"))


def test_a_training_that_nothing_watched_and_that_made_the_child_worse_is_told():
    curve = [{"step": step, "loss": 0.3, "kl": 0.2, "cosine": 0.1} for step in range(3)]
    models = {name: {"kl": kl, "heldout_loss": 1.0} for name, kl in (("parent", 0.0), ("child_before_gkd", 0.1), ("child", 0.4))}
    data = replace(ReportData("p"), gkd_curve=curve, gkd_facts={"steps": 3}, evaluation={"models": models})
    assert "its KL to the parent rose from 0.100 to 0.400. Training was not watched" in render(data)
    watched = {"kept": "step 3", "heldout_kl_before": 0.2, "heldout_kl": 0.1, "returns": 0}
    assert "was not watched" not in render(replace(data, gkd_facts=watched))
    better = {name: own | {"kl": min(own["kl"], 0.05)} for name, own in models.items()}
    assert "was not watched" not in render(replace(data, evaluation={"models": better}))
