"""Global distillation by loss mix, parent, size and seed: python -m benchmarks.gkd_losses --data ../shared/data --out FILE.json [--quick]

For every parent and seed a library is trained and scored. For every size a child is searched whose layers have 1/1.25, 1/1.5 or 1/2 of
the parent's parameters; a budget in parameters needs no timing, so that results do not depend on the machine. Every child is distilled
by KLD and cosine, and those of `MIX_SIZE` by each of the paper's eight mixes (`none` is the child before distillation), all with the same
tokens. The learning rate is chosen by a range test in each case. KL and loss are measured on held-out text that no stage has seen.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.record import write
from puzzle_ray.config import RunConfig, load
from puzzle_ray.distill.settings import MIXES, GkdConfig
from puzzle_ray.evaluation.evaluate import predictions
from puzzle_ray.models.child import load_model, quiet_transformers
from puzzle_ray.pipeline import (
    SEQUENCES,
    Setting,
    architecture_of,
    child_of,
    distilled_of,
    library_of,
    parts_of,
    profile_of,
    read_profile,
    scores_of,
    tokens_of,
)
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Artifact, Store

SIZES = (1.25, 1.5, 2.0)  # the parent's parameters in layers over the child's
MIX_SIZE = 1.5
MIX = "kld+cosine"
TEXTS = {"chars105": "tinystories/train.txt", "stories260K": "tinystories/train.txt", "gutenberg7m": "gutenberg"}
PARENTS = ("tiny", *TEXTS)
BASE = (
    "data.sequence_length=128", "library.tokens=40960", "library.learning_rate=0.001", "library.calibration_tokens=8192",
    "profile.engine=roofline", "profile.device=H100", "profile.scenario={batch_size: 16, input_tokens: 128, output_tokens: 32}",
    "search.candidates=1", "search.sweep={}", "gkd.num_workers=1", "gkd.learning_rate=auto", "gkd.cosine_reduction=mean",
)  # fmt: skip
QUICK = ("library.tokens=8192", "scoring.tokens=2048", "evaluate.tokens=4096", "tiny_parent_steps=40")


def setting(parent: str, data: Path, seed: int, store: str, overrides: Iterable[str], limits: Mapping[str, float]) -> Setting:
    where = [] if parent == "tiny" else [f"parent={data / parent}", f"data.train={data / TEXTS[parent]}"]
    limit = ", ".join(f"{name}: {value}" for name, value in limits.items())
    words = (*BASE, *where, *overrides, f"seed={seed}", f"store={store}", f"search.limits={{{limit}}}")
    config = load("tiny", None, words)
    return Setting(config.model_copy(update={"search": config.search.model_copy(update={"limits": _only(config, limits)})}),
                   Store(store), Quiet())  # fmt: skip


def _only(config: RunConfig, limits: Mapping[str, float]) -> Any:
    """The limits without those of the recipe."""
    return type(config.search.limits).model_validate(dict(limits))


def budget(s: Setting, size: float) -> int:
    """How many parameters a child of a size may have."""
    profile = read_profile(s, profile_of(s))
    fixed = profile.fixed(profile.batch_sizes[0]).num_params
    layer_types = [layer.layer_type for layer in s.space.layers]
    own = [
        profile.row(t, kind, "parent", profile.batch_sizes[0]).num_params for t in layer_types for kind in ("attention", "ffn")
    ]
    return int(fixed + sum(own) / size)


def measured(s: Setting, tokens: Artifact, folders: Mapping[str, str]) -> dict[str, dict[str, float]]:
    batches = parts_of(s, tokens).test.first(s.config.evaluate.tokens, SEQUENCES)
    with quiet_transformers():
        return predictions({name: load_model(folder) for name, folder in folders.items()}, batches)


def distilled(s: Setting, tokens: Artifact, child: Artifact, mix: str) -> Artifact:
    gkd = GkdConfig.model_validate(s.config.gkd.model_dump(exclude={"kl_weight", "cosine_weight", "lm_weight"}) | {"preset": mix})
    return distilled_of(Setting(s.config.model_copy(update={"gkd": gkd}), s.store, s.progress), tokens, child)


def rows_of(
    parent: str, data: Path, seed: int, store: str, overrides: tuple[str, ...], sizes: Iterable[float]
) -> list[dict[str, Any]]:
    """Every child of one parent and seed, distilled by its mixes."""
    rows: list[dict[str, Any]] = []
    whole = setting(parent, data, seed, store, overrides, {"params_fraction": 1.0})
    for size in sizes:
        s = setting(parent, data, seed, store, overrides, {"params": budget(whole, size)})
        tokens = tokens_of(s)
        library = library_of(s, tokens)
        child = child_of(s, library, architecture_of(s, tokens, library, profile_of(s), scores_of(s, tokens, library)))
        mixes = MIXES if size == MIX_SIZE and seed == 0 else (MIX,)
        found = {mix: distilled(s, tokens, child, mix) for mix in mixes}
        folders = {"parent": str(s.parent), "none": child.path("child"), **{m: a.path("child") for m, a in found.items()}}
        models = measured(s, tokens, folders)
        before = models["none"]
        for mix in ("none", *mixes):
            facts = found[mix].facts() if mix in found else {"kept": "start"}
            row = {"parent": parent, "size": size, "seed": seed, "mix": mix, "kl_before": before["kl"], "kl": models[mix]["kl"]}
            row |= {"loss_parent": models["parent"]["heldout_loss"], "loss_before": before["heldout_loss"]}
            row |= {"loss": models[mix]["heldout_loss"], "top1": models[mix]["top1_agreement"]}
            row |= {name: facts.get(name) for name in ("kept", "returns", "learning_rate", "range_test", "tokens")}
            row |= {"heldout_kl_before": facts.get("heldout_kl_before"), "heldout_kl": facts.get("heldout_kl")}
            rows.append(row)
            show(row)
    return rows


def show(row: Mapping[str, Any]) -> None:
    rate = f"{row['learning_rate']:g}" if row["learning_rate"] else "-"
    print(
        f"{row['parent']:12} {row['size']:4.2f} seed {row['seed']}  {row['mix']:14} KL {row['kl_before']:.4f} -> {row['kl']:.4f}  "
        f"loss {row['loss_before']:.4f} -> {row['loss']:.4f} (parent {row['loss_parent']:.4f})  top-1 {row['top1']:.3f}  "
        f"rate {rate}  kept {row['kept']}  returns {row['returns'] or 0}",
        flush=True,
    )


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    grid = [row for row in rows if row["mix"] == MIX]
    worse = [f"{r['parent']} {r['size']} seed {r['seed']}" for r in grid if r["kl"] > r["kl_before"]]
    mixed = [row for row in rows if row["size"] == MIX_SIZE and row["seed"] == 0]
    by_mix = {mix: [r for r in mixed if r["mix"] == mix] for mix in ("none", *MIXES)}
    return {
        "children": len(grid),
        "gkd_worse_than_its_start": len(worse),
        "worse": worse,
        "gkd_never_worse": not worse,
        "kept_the_start": sum(row["kept"] == "start" for row in grid),
        "returns": sum(row["returns"] or 0 for row in grid),
        "kl_after_over_before": statistics.geometric_mean(row["kl"] / row["kl_before"] for row in grid),
        "kl_by_mix_over_before": {m: statistics.geometric_mean(r["kl"] / r["kl_before"] for r in own) for m, own in by_mix.items() if own},
        "loss_above_parent_by_mix": {m: statistics.mean(r["loss"] - r["loss_parent"] for r in own) for m, own in by_mix.items() if own},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of parents and texts")
    parser.add_argument("--parents", nargs="+", default=PARENTS, choices=PARENTS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=204_800, help="of every distillation")
    parser.add_argument("--store", help="a folder to keep (default: a temporary one, so that nothing is reused)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="one size, one seed, few tokens")
    given = parser.parse_args()
    tokens, seeds, sizes = (20_480, 1, (MIX_SIZE,)) if given.quick else (given.tokens, given.seeds, SIZES)
    overrides = (*(QUICK if given.quick else ()), f"gkd.tokens={tokens}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(seeds):
            for parent in given.parents:
                rows += rows_of(parent, given.data, seed, given.store or scratch, overrides, sizes)
                write(given.out, rows, summary_of(rows) | {"gkd_tokens": tokens})
    for name, value in summary_of(rows).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
