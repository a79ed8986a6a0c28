"""Scores in bfloat16 against scores in float32: python -m benchmarks.scoring_dtype --out FILE.json [--quick]

The parent is `--parent` (default: the tiny recipe's) with `--data`. Library and profile are made once in `--store`, then every
replacement is scored in both dtypes on the same text. `spearman` compares the two over all replacements by `scoring.metric`;
`same_architectures` says at how many of five budgets the search finds the same answer. Where it does not, both answers are measured as
whole children, in float32 on the same held-out tokens: `excess` is the KL of the bfloat16 scores' child over that of the float32
scores' child, less 1.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import write
from benchmarks.scoring import spearman
from benchmarks.searchers import BUDGETS, parser_of, words_of
from jobs.run import Run
from jobs.session import connected
from jobs.stages import architecture, scores
from puzzle_ray.config import load
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.setup import solve_budget

DTYPES = ("float32", "bfloat16")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--quick", action="store_true", help="few tokens")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        words = words_of(arguments, scratch)
        runs = {dtype: Run(load("tiny", None, (*words, f"scoring.dtype={dtype}"))) for dtype in DTYPES}
        own = runs["float32"]
        with connected(own.config.cluster):
            for run in runs.values():
                run.done("profile", "scores")
            found = {
                (dtype, s): solve_budget(architecture.setup(run), Limits(speedup=s))
                for dtype, run in runs.items()
                for s in BUDGETS
            }
            with architecture.measuring(own) as measure:
                measured = dict(zip(found, measure([a.choices for a in found.values()]), strict=True))
        tables = {dtype: scores.read(run) for dtype, run in runs.items()}
    metric = own.config.scoring.metric
    values = {dtype: [row.value for row in table.rows if row.metric == metric] for dtype, table in tables.items()}
    ratios = np.abs(np.array(values["bfloat16"]) / np.array(values["float32"]) - 1)
    for speedup in BUDGETS:
        pair = [found[dtype, speedup].choices for dtype in DTYPES]
        kl = {dtype: measured[dtype, speedup].kl for dtype in DTYPES}
        row = {"speedup": speedup, "layers_unlike": sum(a != b for a, b in zip(*pair, strict=True))}
        rows.append(row | {f"{d}_kl": v for d, v in kl.items()} | {"excess": kl["bfloat16"] / kl["float32"] - 1})
        print("  ".join(f"{name} {value:.5g}" for name, value in rows[-1].items()), flush=True)
    summary = {
        "spearman": spearman(values["bfloat16"], values["float32"]),
        "replacements": len(values["float32"]),
        "median_difference": float(np.median(ratios)),
        "max_difference": float(ratios.max()),
        "same_architectures": sum(row["layers_unlike"] == 0 for row in rows),
        "budgets": list(BUDGETS),
        "max_excess": max(row["excess"] for row in rows),
        "parent": Path(own.config.parent).name,
        "tokens": own.config.scoring.tokens,
    }
    for name, value in summary.items():
        print(f"{name:24} {value}")
    write(arguments.out, rows, summary)


if __name__ == "__main__":
    main()
