"""What `benchmarks.methods` says of its rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
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


def _stderr_of_difference(stderr: Mapping[str, float], a: str, b: str) -> float | None:
    return math.hypot(stderr[a], stderr[b]) if a in stderr and b in stderr else None


ROUNDS = ("iterative",)  # methods of more than one round: no rivals of one


def summary_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds; a case is one parent at one speed.

    A rival that is below Puzzle counts with the difference of the means and the standard error of that difference, None where one of
    the two has a single seed.
    """
    cases: dict[tuple[str, float], dict[str, list[float]]] = {}
    for row in rows:
        if row["kl"] is not None:
            cases.setdefault((row["parent"], row["speed"]), {}).setdefault(row["method"], []).append(row["kl"])
    kl = {f"{p} {s:g}": {m: statistics.mean(v) for m, v in found.items()} for (p, s), found in cases.items()}
    kl_stderr = {
        f"{p} {s:g}": {m: statistics.stdev(v) / len(v) ** 0.5 for m, v in found.items() if len(v) > 1}
        for (p, s), found in cases.items()
    }
    wins = {
        f"{case}: {method}": {
            "difference": value - found["puzzle"],
            "stderr": _stderr_of_difference(kl_stderr[case], method, "puzzle"),
        }
        for case, found in kl.items()
        for method, value in found.items()
        if "puzzle" in found and method not in ROUNDS and value < found["puzzle"]
    }
    ran = [row for row in rows if row["kl"] is not None and row["gkd_tokens"]]
    worse = [f"{r['parent']} {r['speed']:g} seed {r['seed']} {r['method']}" for r in ran if r["kl"] > r["kl_before"]]
    speeds_measured = [r["measured_speedup"] / r["speed"] for r in rows if r["kl"] is not None and r["measured_speedup"]]
    return {
        "puzzle_best_everywhere": not wins,
        "rivals_below_puzzle": wins,
        "puzzle_best_within_two_stderr": all(
            w["stderr"] is not None and -w["difference"] <= 2 * w["stderr"] for w in wins.values()
        ),
        "kl": kl,
        "kl_stderr_over_seeds": kl_stderr,
        "gkd_runs": len(ran),
        "gkd_worse_than_its_start": worse,
        "gkd_never_worse": not worse,
        "gkd_kept_the_start": sum(row["kept"] == "start" for row in ran),
        "measured_over_asked_speed": [min(speeds_measured), max(speeds_measured)] if speeds_measured else None,
    }
