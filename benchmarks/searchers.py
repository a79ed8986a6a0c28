"""Every searcher at five budgets: predicted and true KL, and time. python -m benchmarks.searchers --out FILE.json [--quick]

The parent is `--parent` (default: the tiny recipe's) with `--data`; what its run needs (library, profile, scores) is made in
`--store` first. Every answer is measured as a whole child, on the tokens that the pick is made on and on as many others that
nothing was chosen by. `mip, picked` is the search with measurement: diverse answers, rivals, local search.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import write
from jobs.run import Run
from jobs.session import connected
from jobs.stages import architecture, tokens
from puzzle_ray.artifacts import Measure
from puzzle_ray.config import load
from puzzle_ray.errors import ConfigError, Infeasible
from puzzle_ray.search.limits import Limits
from puzzle_ray.search.pick import PickOptions, pick
from puzzle_ray.search.searcher import searchers

BUDGETS = (1.2, 1.5, 1.75, 2.0, 2.5)
PICKED = "mip, picked"
RIVALS = ("greedy", "depth", "uniform", "max_params")
QUICK = ("library.tokens=20480", "scoring.tokens=4096", "search.measure_tokens=2048")


def answers(run: Run, speedup: float, how: PickOptions, measure: Measure) -> list[dict[str, Any]]:
    """One row per searcher, not measured on other tokens yet."""
    setup = architecture.setup(run)
    tables, options, limits = setup.tables, setup.options, Limits(speedup=speedup)
    rows = []
    for name in sorted(searchers()):
        row: dict[str, Any] = {"speedup": speedup, "searcher": name}
        started = time.perf_counter()
        try:
            found = tables.search(limits, searcher=name, options=options)[0].architecture
        except (Infeasible, ConfigError) as error:
            rows.append(row | {"failed": str(error)})
            continue
        row |= {"seconds": time.perf_counter() - started, "predicted": found.objective, "gained": found.predicted_speedup}
        rows.append(row | {"choices": found.choices})
    started = time.perf_counter()
    found, report = pick(tables, limits, how, options, measure)
    extra = {"origin": report["picked"]["origin"], "children_measured": len(report["candidates"]) + len(report["local_search"])}
    extra |= {"seconds": time.perf_counter() - started, "predicted": found.objective, "gained": found.predicted_speedup}
    return [*rows, {"speedup": speedup, "searcher": PICKED, "choices": found.choices} | extra]


def measured(rows: list[dict[str, Any]], name: str, measure: Measure) -> None:
    """Adds the true KL of every row that has an answer."""
    there = [row for row in rows if "choices" in row]
    for row, found in zip(there, measure([row["choices"] for row in there]), strict=True):
        row |= {name: found.kl, f"{name}_stderr": found.stderr}


def never_worse(rows: list[dict[str, Any]], ours: str, column: str, stderrs: float = 0.0) -> bool:
    """Whether no searcher has less of a column than ours at the same budget (by more than so many standard errors)."""
    for mine in (row for row in rows if row["searcher"] == ours):
        names = set(searchers()) | {ours}
        others = [row[column] for row in rows if row["speedup"] == mine["speedup"] and row["searcher"] in names]
        if mine[column] - stderrs * mine[f"{column}_stderr"] > min(others):
            return False
    return True


def show(row: dict[str, Any]) -> None:
    if "choices" not in row:
        print(f"{row['speedup']:5.2f} x  {row['searcher']:14} {row['failed']}", flush=True)
        return
    print(
        f"{row['speedup']:5.2f} x  {row['searcher']:14} predicted {row['predicted']:8.5f}  true KL {row['kl']:8.5f}  "
        f"unseen {row['kl_unseen']:8.5f} +- {row['kl_unseen_stderr']:.5f}  {row['seconds']:7.2f} s  {row.get('origin', '')}",
        flush=True,
    )


def unseen(run: Run) -> Any:
    """As `architecture.measuring`, on the held-out tokens behind those the pick is made on."""
    from actors.child_meter import measuring

    count, length = run.config.search.measure_tokens, run.config.data.sequence_length
    sequences = tokens.read(run)[1].sequences[count // length : 2 * count // length]
    assert len(sequences), "the held-out text is too short for a second set of tokens; lower search.measure_tokens"
    each = max(1, run.config.scoring.micro_batch_tokens // length)
    batches = [sequences[i : i + each].astype("int64") for i in range(0, len(sequences), each)]
    library = run.content("library")
    inputs = {"library": library.key, "tokens": run.content("tokens").key}
    step = run.store.artifact("measured", {"tokens": count, "sequences": each, "from": count // length}, inputs)
    return measuring(run.parent.address, library, batches, run.config.cluster, step, run.progress)


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """What every benchmark of a whole run is asked for."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--parent", help="tiny, a Hugging Face folder, or a hub id")
    parser.add_argument("--data", help="training text")
    parser.add_argument("--store", help="where the run's artifacts are kept (default: thrown away)")
    parser.add_argument("--set", action="append", default=[], help="one setting, section.key=value")
    return parser


def words_of(arguments: argparse.Namespace, scratch: str) -> tuple[str, ...]:
    """The settings that were asked for."""
    words = [f"{name}={value!r}" for name, value in (("parent", arguments.parent), ("data.train", arguments.data)) if value]
    return (*words, f"store={arguments.store or scratch!r}", *(QUICK if arguments.quick else ()), *arguments.set)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--candidates", type=int, default=6)
    parser.add_argument("--steps", type=int, default=6, help="steps of local search")
    parser.add_argument("--quick", action="store_true", help="few tokens, two budgets, no local search")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(load("tiny", None, words_of(arguments, scratch)))
        run.check()
        steps = 0 if arguments.quick else arguments.steps
        how = PickOptions("mip", arguments.candidates, 2, RIVALS, steps=steps)
        rows: list[dict[str, Any]] = []
        with connected(run.config.cluster):
            run.done("profile", "scores")  # before anything is timed
            with architecture.measuring(run) as measure:
                for speedup in BUDGETS[1:4:2] if arguments.quick else BUDGETS:
                    try:
                        rows += answers(run, speedup, how, measure)
                    except Infeasible as error:
                        print(f"{speedup:5.2f} x  {error}", file=sys.stderr)
                measured(rows, "kl", measure)
            with unseen(run) as measure:
                measured(rows, "kl_unseen", measure)
    for row in rows:
        show(row)
        row["choices"] = [choice.label for choice in row.get("choices", ())]
    write(arguments.out, rows, summary_of([row for row in rows if row["choices"]], run))


def summary_of(rows: list[dict[str, Any]], run: Run) -> dict[str, Any]:
    predicted = [(row["predicted"], row["kl"]) for row in rows if row["searcher"] == "mip"]
    gains = {
        name: math.exp(sum(math.log(b["kl"] / a["kl"]) for a, b in pairs) / len(pairs))
        for name in sorted({row["searcher"] for row in rows} - {PICKED})
        if (pairs := _pairs(rows, name))
    }
    summary = {
        "mip_never_worse": never_worse(rows, PICKED, "kl"),
        "mip_never_worse_unseen": never_worse(rows, PICKED, "kl_unseen"),
        "mip_never_worse_unseen_within_2_stderr": never_worse(rows, PICKED, "kl_unseen", 2.0),
        "mip_unmeasured_never_worse": never_worse(rows, "mip", "kl"),
        "budgets": sorted({row["speedup"] for row in rows}),
        "picked_from": [row["origin"] for row in rows if row["searcher"] == PICKED],
        "mip_predicted_over_true_kl": [p / kl for p, kl in predicted if kl > 0],
        "geomean_kl_over_picked": gains,
        "parent": Path(run.config.parent).name,
        "measure_tokens": run.config.search.measure_tokens,
    }
    for name, value in summary.items():
        print(f"{name:40} {value}")
    return summary


def _pairs(rows: list[dict[str, Any]], name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(picked, other) at every budget that the other has an answer to."""
    picked = {row["speedup"]: row for row in rows if row["searcher"] == PICKED}
    return [(picked[row["speedup"]], row) for row in rows if row["searcher"] == name and row["kl"] > 0]


if __name__ == "__main__":
    main()
