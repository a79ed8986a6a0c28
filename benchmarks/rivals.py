"""How few measured children a pick needs: with all rivals beside diverse answers, with corrected scores in their place, and without.

    python -m benchmarks.rivals --data ../shared/data --out FILE.json

For every parent a library is trained and scored, and its profile measured. At every budget the architecture is picked in five ways:
`always`, three answers of the MIP that differ and one of each of four simpler searchers; `default`, as a run is configured that asks for
three answers: what measured children say leaves answers out, and corrects scores; `rivals_if_far`, the three answers, and the simpler
searchers' where the least KL is far above its sum of scores; `never`, the three answers alone; `first`, the best answer, of which nothing
is measured. KL is on the tokens that the pick is made by, and on others that nothing was chosen by.
A case is a parent, a seed, a library's tokens and a budget; those that are in the output already are not made again, and may have been
made with other settings.
"""

from __future__ import annotations

import argparse
import json
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
from puzzle_ray.pipeline import SEQUENCES, measuring, parts_of, scores_of
from puzzle_ray.search.pick import PickOptions, pick
from puzzle_ray.search.settings import SearchConfig

BUDGETS = (1.2, 1.35, 1.5, 1.75, 2.0)
RIVALS = ("greedy", "depth", "uniform", "max_params")
CONFIG = SearchConfig(candidates=3)
FAR = CONFIG.rivals_from
WAYS = {
    "always": PickOptions("mip", 3, 2, RIVALS),
    "default": PickOptions("mip", 3, 2, RIVALS, FAR, predicted_within=CONFIG.predicted_within, corrections=CONFIG.corrections),
    "rivals_if_far": PickOptions("mip", 3, 2, RIVALS, FAR),
    "never": PickOptions("mip", 3, 2),
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


def rows_of(bench: Bench, speeds: Sequence[float]) -> list[dict[str, Any]]:
    scores = scores_of(bench.s, bench.tokens, bench.library)
    unseen = parts_of(bench.s, bench.tokens).test.first(bench.s.config.evaluate.tokens, SEQUENCES)
    meter, rows = ChildMeter(bench.s.stack(), Library(bench.library), unseen), []
    with measuring(bench.s, bench.tokens, bench.library) as plain:
        measure, elsewhere = Counting(plain), Counting(lambda children: [meter.measure(choices) for choices in children])
        for speed in speeds:
            setup = bench.setup(scores, speed)
            for way, options in WAYS.items():
                measure.asked.clear()
                try:
                    found, report = pick(setup.tables, setup.limits, options, setup.options, measure)
                except Infeasible:
                    continue
                asked = 0 if way == "first" else len(measure.asked)
                (own,), (other,) = measure([found.choices]), elsewhere([found.choices])
                row = {"parent": bench.parent, "seed": bench.seed, "library_tokens": bench.s.config.library.tokens}
                row |= {"speed": speed, "way": way, "children": asked, "kl": own.kl}
                row |= {"kl_stderr": own.stderr, "kl_unseen": other.kl, "kl_unseen_stderr": other.stderr}
                row |= {
                    "origin": report["picked"]["origin"],
                    "predicted": found.objective,
                    "layers": [c.label for c in found.choices],
                }
                print({name: value for name, value in row.items() if name != "layers"}, flush=True)
                rows.append(row)
    return rows


def summary_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`not_above_always`: at how many cases the KL of a way's pick is not above that of `always`."""
    by = {(r["parent"], r["seed"], r["library_tokens"], r["speed"], r["way"]): r for r in rows}
    cases = [key[:4] for key in by if key[4] == "always"]

    def mean_ratio(way: str, column: str) -> float:
        return math.exp(statistics.mean(math.log(by[(*c, way)][column] / by[(*c, "always")][column]) for c in cases))

    def not_above(way: str, column: str, among: Sequence[tuple[Any, ...]]) -> int:
        return sum(by[(*c, way)][column] <= by[(*c, "always")][column] for c in among)

    def counts(among: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
        return {
            "cases": len(among),
            "children_measured": {way: sum(by[(*c, way)]["children"] for c in among) for way in WAYS},
            "not_above_always": {way: not_above(way, "kl", among) for way in WAYS},
            "not_above_always_unseen": {way: not_above(way, "kl_unseen", among) for way in WAYS},
        }

    return {
        **counts(cases),
        "parents": sorted({r["parent"] for r in rows}),
        "kl_over_always": {way: mean_ratio(way, "kl") for way in WAYS},
        "kl_unseen_over_always": {way: mean_ratio(way, "kl_unseen") for way in WAYS},
        "picked_from_rivals": [list(c) for c in cases if by[(*c, "always")]["origin"] in RIVALS],
        "default_differs": [
            [*c, by[(*c, "always")]["kl"], by[(*c, "default")]["kl"], by[(*c, "default")]["origin"]]
            for c in cases
            if by[(*c, "always")]["kl"] != by[(*c, "default")]["kl"]
        ],
        "by_library": {_name(*one): counts([c for c in cases if c[:3] == one]) for one in dict.fromkeys(c[:3] for c in cases)},
    }


def _name(parent: str, seed: int, library_tokens: int) -> str:
    return f"{parent}, seed {seed}, {library_tokens} tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of parents and texts")
    parser.add_argument("--parents", nargs="+", default=PARENTS, choices=PARENTS)
    parser.add_argument("--speeds", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--store", help="a folder to keep (default: a temporary one)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="section.key=value")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of rows")
    given = parser.parse_args()
    before = json.loads(given.out.read_text()) if given.out.exists() else {"rows": [], "summary": {}}
    rows, settings = before["rows"], before["summary"].get("settings", {})
    with tempfile.TemporaryDirectory() as scratch:
        for parent in given.parents:
            for seed in given.seeds:
                bench = Bench(parent, given.data, seed, given.store or scratch, given.overrides)
                library = (parent, seed, bench.s.config.library.tokens)
                there = {r["speed"] for r in rows if (r["parent"], r["seed"], r["library_tokens"]) == library}
                speeds = [speed for speed in given.speeds if speed not in there]
                if speeds:
                    rows += rows_of(bench, speeds)
                    settings[_name(*library)] = given.overrides
                    write(given.out, rows, summary_of(rows) | {"settings": settings})
    for name, value in summary_of(rows).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
