"""Architectures by the Fisher shortlist against those by exact scores, at five budgets.

    python -m benchmarks.fisher --out FILE.json [--quick]

The parent is `--parent` (default: the tiny recipe's) with `--data`; library, profile and both kinds of scores are made in `--store`
first, and what the shortlist's answers use is scored exactly until none rests on an estimate. Both answers are the search's own, one
per budget and not picked by measurement; then both are measured as whole children on the same held-out tokens. `excess` is the KL of the
shortlist's child over that of the exact scores' child, less 1; `share_scored` what part of all exchanges was scored for all budgets
together, `share_scored_at_first` what part before the first search.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.record import write
from benchmarks.searchers import BUDGETS, parser_of, words_of
from jobs.run import Run
from jobs.session import connected
from jobs.stages import architecture, scores
from puzzle_ray.artifacts import Scores
from puzzle_ray.config import load
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.setup import SearchSetup, solve_budget

KINDS = {"exact": "none", "fisher": "fisher"}


def searched(run: Run) -> SearchSetup:
    """What a run searches, with exact scores for all that its answers to the budgets use."""
    run.done("profile", "scores")
    setup, make_exact = architecture.setup(run), scores.exact(run)
    if make_exact is None:
        return setup
    return replace(
        setup,
        scores=make_exact(
            setup.scores, lambda seen: [solve_budget(replace(setup, scores=seen), Limits(speedup=s)).choices for s in BUDGETS]
        ),
    )


def share_scored(scores: Scores) -> float:
    rows = [row for row in scores.rows if row.metric == "kl"]
    return sum(row.tokens > 0 for row in rows) / len(rows)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--quick", action="store_true", help="few tokens")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        words = words_of(arguments, scratch)
        runs = {kind: Run(load("tiny", None, (*words, f"scoring.shortlist={name}"))) for kind, name in KINDS.items()}
        with connected(runs["exact"].config.cluster):
            setups = {kind: searched(run) for kind, run in runs.items()}
            found = {(kind, s): solve_budget(setup, Limits(speedup=s)) for kind, setup in setups.items() for s in BUDGETS}
            with architecture.measuring(runs["exact"]) as measure:
                measured = dict(zip(found, measure([a.choices for a in found.values()]), strict=True))
    for speedup in BUDGETS:
        row: dict[str, Any] = {"speedup": speedup}
        for kind in KINDS:
            answer, child = found[kind, speedup], measured[kind, speedup]
            row |= {f"{kind}_predicted": answer.objective, f"{kind}_kl": child.kl, f"{kind}_stderr": child.stderr}
        pairs = zip(found["exact", speedup].choices, found["fisher", speedup].choices, strict=True)
        row |= {"layers_unlike": sum(a != b for a, b in pairs), "excess": row["fisher_kl"] / row["exact_kl"] - 1}
        rows.append(row)
        print("  ".join(f"{name} {value:.5g}" for name, value in row.items()), flush=True)
    summary = {
        "max_excess": max(row["excess"] for row in rows),
        "share_scored_at_first": share_scored(scores.read(runs["fisher"])),
        "share_scored": share_scored(setups["fisher"].scores),
        "budgets": list(BUDGETS),
        "parent": Path(runs["exact"].config.parent).name,
        "measure_tokens": runs["exact"].config.search.measure_tokens,
    }
    for name, value in summary.items():
        print(f"{name:24} {value}")
    write(arguments.out, rows, summary)


if __name__ == "__main__":
    main()
