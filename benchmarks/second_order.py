"""The pick by corrected scores beside the pick among diverse answers and rivals: KL, and children measured for it.

    python -m benchmarks.second_order --data ../shared/data --out FILE.json

For every parent a library is trained and scored, and its profile measured. At five budgets the architecture is picked in three ways:
`today`, the tiny recipe's (three answers that differ, and four rivals); `corrected`, by the best answer and up to `STEPS` answers of
scores that are corrected by what was measured; `first`, the best answer, of which nothing is measured. KL is on the tokens that the pick
is made by, and on others.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods import PARENTS, Bench
from benchmarks.record import write
from puzzle_ray.artifacts import Choices, Measure, Measured
from puzzle_ray.distill.library import Library
from puzzle_ray.errors import Infeasible
from puzzle_ray.evaluation.child_meter import ChildMeter
from puzzle_ray.pipeline import measuring, parts_of, scores_of
from puzzle_ray.search.pick import PickOptions, pick

BUDGETS = (1.2, 1.35, 1.5, 1.75, 2.0)
STEPS = 2
WAYS = {
    "today": PickOptions("mip", 3, 2, ("greedy", "depth", "uniform", "max_params")),
    "corrected": PickOptions("mip", 1, fit_steps=STEPS),
    "first": PickOptions("mip", 1),
}


class Counting:
    """Measures every child once, and counts those that one pick asks for."""

    def __init__(self, measure: Measure) -> None:
        self.measure, self.known, self.asked = measure, dict[Choices, Measured](), set[Choices]()

    def __call__(self, children: Sequence[Choices]) -> list[Measured]:
        new = [c for c in dict.fromkeys(children) if c not in self.known]
        self.known |= dict(zip(new, self.measure(new), strict=True))
        self.asked |= set(children)
        return [self.known[c] for c in children]


def rows_of(bench: Bench) -> list[dict[str, Any]]:
    scores = scores_of(bench.s, bench.tokens, bench.library)
    config, rows = bench.s.config, []
    unseen = parts_of(bench.s, bench.tokens).test.first(config.evaluate.tokens, 16)
    meter = ChildMeter(bench.s.stack(), Library(bench.library), unseen)
    with measuring(bench.s, bench.tokens, bench.library) as plain:
        measure = Counting(plain)
        elsewhere = Counting(lambda children: [meter.measure(choices) for choices in children])
        for speed in BUDGETS:
            setup = bench.setup(scores, speed)
            for way, options in WAYS.items():
                measure.asked.clear()
                try:
                    found, _ = pick(setup.tables, setup.limits, options, setup.options, measure)
                except Infeasible:
                    continue
                asked = 0 if way == "first" else len(measure.asked)
                (own,), (other,) = measure([found.choices]), elsewhere([found.choices])
                row = {"parent": bench.parent, "seed": bench.seed, "speed": speed, "way": way, "children": asked, "kl": own.kl}
                row |= {"stderr": own.stderr, "kl_unseen": other.kl, "layers": [c.label for c in found.choices]}
                print(row | {"layers": ""}, flush=True)
                rows.append(row)
    return rows


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    by = {(r["parent"], r["seed"], r["speed"], r["way"]): r for r in rows}
    cases = [key[:3] for key in by if key[3] == "today" and (*key[:3], "corrected") in by]

    def ratio(way: str, column: str) -> float:
        return math.exp(statistics.mean(math.log(by[*c, way][column] / by[*c, "today"][column]) for c in cases))

    children = {way: sum(by[*c, way]["children"] for c in cases) for way in WAYS}
    return {
        "cases": len(cases),
        "children_measured": children,
        "not_above_today": sum(by[*c, "corrected"]["kl"] <= by[*c, "today"]["kl"] for c in cases),
        "first_not_above_today": sum(by[*c, "first"]["kl"] <= by[*c, "today"]["kl"] for c in cases),
        "kl_over_today": {way: ratio(way, "kl") for way in ("corrected", "first")},
        "kl_unseen_over_today": {way: ratio(way, "kl_unseen") for way in ("corrected", "first")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of parents and texts")
    parser.add_argument("--parents", nargs="+", default=PARENTS, choices=PARENTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--store", help="a folder to keep (default: a temporary one)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="section.key=value")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for parent in given.parents:
            for seed in given.seeds:
                rows += rows_of(Bench(parent, given.data, seed, given.store or scratch, given.overrides))
                write(given.out, rows, summary_of(rows) | {"settings": given.overrides})
    for name, value in summary_of(rows).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
