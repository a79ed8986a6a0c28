"""What `benchmarks.methods` says of its rows."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any


def show(row: Mapping[str, Any]) -> None:
    about = f"{row['parent']:12} seed {row['seed']} {row['speed']:4.2f} x {row['method']:10}"
    if row["kl"] is None:
        print(f"{about} none: {row['problem']}", flush=True)
        return
    predicted, measured = (f"{row[name]:.3f}" if row[name] else "-" for name in ("predicted_speedup", "measured_speedup"))
    print(
        f"{about} KL {row['kl_before']:.4f} -> {row['kl']:.4f}  loss {row['loss']:.4f} (parent {row['loss_parent']:.4f})  top-1 "
        f"{row['top1']:.3f}  predicted {predicted} x  measured {measured} x  kept {row['kept']}",
        flush=True,
    )


NO_RIVALS = ("puzzle", "distilled_pick", "no_race", "iterative")  # Puzzle itself, with another pick, in more than one round
Kls = Mapping[str, Mapping[int, float]]  # of one parent and speed: by method and seed


def _mean_and_stderr(values: Collection[float]) -> tuple[float, float | None]:
    """The standard error is None for a single value."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def _rivals_below(found: Kls) -> dict[str, dict[str, float | None]]:
    """Rivals whose KL is below Puzzle's in the mean over the seeds that both have, by how much, and the standard error of that."""
    below = {}
    for method in found if "puzzle" in found else ():
        seeds = found[method].keys() & found["puzzle"].keys()
        if method not in NO_RIVALS and seeds:
            difference, stderr = _mean_and_stderr([found[method][seed] - found["puzzle"][seed] for seed in seeds])
            if difference < 0:
                below[method] = {"difference": difference, "stderr": stderr, "seeds": len(seeds)}
    return below


def summary_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds; a case is one parent at one speed. Rivals are compared with Puzzle seed by seed."""
    cases: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row["kl"] is not None:
            of_case = cases.setdefault(f"{row['parent']} {row['speed']:g}", {})
            of_case.setdefault(row["method"], {})[row["seed"]] = row["kl"]
    over_seeds = {case: {m: _mean_and_stderr(v.values()) for m, v in found.items()} for case, found in cases.items()}
    below = {f"{case}: {m}": d for case, found in cases.items() for m, d in _rivals_below(found).items()}
    ran = [row for row in rows if row["kl"] is not None and row["gkd_tokens"]]
    worse = [f"{r['parent']} {r['speed']:g} seed {r['seed']} {r['method']}" for r in ran if r["kl"] > r["kl_before"]]
    speeds_measured = [r["measured_speedup"] / r["speed"] for r in rows if r["kl"] is not None and r["measured_speedup"]]
    return {
        "puzzle_best_everywhere": not below,
        "rivals_below_puzzle": below,
        "kl": {case: {m: mean for m, (mean, _) in found.items()} for case, found in over_seeds.items()},
        "kl_stderr_over_seeds": {
            case: {m: stderr for m, (_, stderr) in found.items() if stderr is not None} for case, found in over_seeds.items()
        },
        "gkd_runs": len(ran),
        "gkd_worse_than_its_start": worse,
        "gkd_never_worse": not worse,
        "gkd_kept_the_start": sum(row["kept"] == "start" for row in ran),
        "measured_over_asked_speed": [min(speeds_measured), max(speeds_measured)] if speeds_measured else None,
    }
