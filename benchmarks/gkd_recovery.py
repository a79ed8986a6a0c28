"""What a short global distillation gives back of what a child had lost: python -m benchmarks.gkd_recovery --data DIR --out FILE.json

The child of recipe `tiny` at 1.5 x, and children of two other trained parents whose layers have 1/1.5 of the parent's parameters. Each is
distilled with the same few tokens, by default 5 % of those that the tiny parent was trained on, in steps of 256 tokens:

- `mean`: KLD and the mean over layers of the cosine distances, the learning rate falls to 0.
- `sum`: KLD and the sum of the cosine distances (preset `paper`), the learning rate falls to 0.
- `average`: the same losses with `gkd.average_weights`: the rate stays, and the running average of the weights is published.

KL is on held-out text that no stage has read. `recovered` is the share of the child's KL before that is gone. `tokens` are those of all
steps, those of steps that training went back over counted as often as they were read.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gkd_losses import budget, measured, setting
from benchmarks.record import write
from puzzle_ray.config import load
from puzzle_ray.distill.guard import HeldoutRow
from puzzle_ray.distill.rungs import read_looks
from puzzle_ray.distill.settings import GkdConfig
from puzzle_ray.pipeline import (
    Setting,
    architecture_of,
    child_of,
    distilled_of,
    library_of,
    profile_of,
    scores_of,
    tokens_of,
)
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Artifact, Store

SIZE, STEP_TOKENS, SHARE = 1.5, 256, 0.05
RATES = {"tiny": 2e-4, "stories260K": 3e-4, "chars105": 1e-4}  # near the best one of each, for all ways
WAYS: Mapping[str, Mapping[str, Any]] = {
    "mean": {"preset": "kld+cosine"},
    "sum": {"preset": "paper"},
    "average": {"preset": "paper", "average_weights": True},
}
QUICK = ("library.tokens=8192", "scoring.tokens=2048", "evaluate.tokens=4096", "tiny_parent_steps=40")


def setting_of(parent: str, data: Path, store: str, overrides: tuple[str, ...]) -> Setting:
    if parent == "tiny":
        return Setting(load("tiny", None, (*overrides, f"store={store}")), Store(store), Quiet())
    whole = setting(parent, data, 0, store, overrides, {"params_fraction": 1.0})
    return setting(parent, data, 0, store, overrides, {"params": budget(whole, SIZE)})


def distilled(s: Setting, tokens: Artifact, child: Artifact, way: str, parent: str, seed: int, count: int) -> Artifact:
    how = {"tokens": count, "micro_batch_tokens": STEP_TOKENS, "learning_rate": RATES[parent], "heldout_tokens": 4096}
    config = s.config.model_copy(update={"gkd": GkdConfig.model_validate(how | WAYS[way]), "seed": seed})
    return distilled_of(replace(s, config=config), tokens, child)


def steps_read_again(looks: Sequence[HeldoutRow]) -> int:
    """Steps that training went back over."""
    best, again = looks[0], 0
    for row in looks[1:]:
        if row.returned:
            again += row.step - best.step
        elif row.kl < best.kl:
            best = row
    return again


def rows_of(parent: str, data: Path, store: str, overrides: tuple[str, ...], seeds: int, count: int) -> Iterable[dict[str, Any]]:
    s = setting_of(parent, data, store, overrides)
    tokens = tokens_of(s)
    library = library_of(s, tokens)
    child = child_of(s, library, architecture_of(s, tokens, library, profile_of(s), scores_of(s, tokens, library)))
    own = s.tiny_parent.facts()["train_tokens"] if parent == "tiny" else None
    for seed in range(seeds):
        found = {way: distilled(s, tokens, child, way, parent, seed, count) for way in WAYS}
        folders = {"parent": str(s.parent), "before": child.path("child"), **{way: a.path("child") for way, a in found.items()}}
        models = measured(s, tokens, folders)
        for way, artifact in found.items():
            facts, before, after = artifact.facts(), models["before"]["kl"], models[way]["kl"]
            read = facts["tokens"] + STEP_TOKENS * steps_read_again(read_looks(artifact))
            row = {"parent": parent, "way": way, "seed": seed, "kl_before": before, "kl": after, "recovered": 1 - after / before}
            row |= {"tokens": read, "share_of_parent_tokens": read / own if own else None, "learning_rate": RATES[parent]}
            yield row | {name: facts[name] for name in ("kept", "returns", "heldout_kl_before", "heldout_kl")}


def summary_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    by: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        by.setdefault(row["parent"], {}).setdefault(row["way"], []).append(row)
    kl = {parent: {way: statistics.mean(r["kl"] for r in own) for way, own in ways.items()} for parent, ways in by.items()}
    tiny = by.get("tiny", {})
    best = min(kl.get("tiny", {}), key=lambda way: kl["tiny"][way], default=None)
    return {
        "way": best,
        "recovered": statistics.mean(r["recovered"] for r in tiny[best]) if best else None,
        "tokens": max(r["tokens"] for r in tiny[best]) if best else None,
        "share_of_parent_tokens": max(r["share_of_parent_tokens"] for r in tiny[best]) if best else None,
        "half_recovered": all(r["recovered"] >= 0.5 and r["share_of_parent_tokens"] <= SHARE for r in tiny[best]) if best else None,
        "best_way_by_parent": {parent: min(ways, key=lambda way: ways[way]) for parent, ways in kl.items()},
        "kl_by_parent_and_way": kl,
        "kl_before": {parent: next(iter(ways.values()))[0]["kl_before"] for parent, ways in by.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of parents and texts")
    parser.add_argument("--parents", nargs="+", default=tuple(RATES), choices=tuple(RATES))
    parser.add_argument("--seeds", type=int, default=3, help="of the order of GKD's text")
    parser.add_argument("--tokens", type=int, default=20_480, help="of every distillation")
    parser.add_argument("--store", help="a folder to keep (default: a temporary one, so that nothing is reused)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="one seed, weaker parents and children")
    given = parser.parse_args()
    overrides, seeds = (QUICK, 1) if given.quick else ((), given.seeds)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for parent in given.parents:
            for row in rows_of(parent, given.data, given.store or scratch, overrides, seeds, given.tokens):
                rows.append(row)
                print(f"{parent:12} seed {row['seed']}  {row['way']:8} KL {row['kl_before']:.4f} -> {row['kl']:.4f}  "
                      f"{row['recovered']:.1%} recovered  {row['tokens']} tokens  {row['kept']}", flush=True)  # fmt: skip
                write(given.out, rows, summary_of(rows))
    for name, value in summary_of(rows).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
