"""What the report says of local distillation beyond the tables of variants: early stops and coupled pairs."""

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
    return re.sub(r"<[^>]*>", " ", "".join(distillation_details(data)))


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
