"""What block distillation does for every variant:
python -m benchmarks.bld_variants --parent DIR --text FILE --tokens N --out FILE.json [--quick]

Every variant of every layer is exchanged alone, as it starts without training and after local distillation, and its damage measured on
the same held-out tokens: the KL from the parent's predictions, beside the block loss that was trained on. Variants that have no weights
(noop) are left out.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.bld_tokens import QUICK_HELDOUT_TOKENS, QUICK_TOKENS, Setting
from benchmarks.record import write
from puzzle_ray.artifacts import PARENT
from puzzle_ray.distill.bld import LibraryRow
from puzzle_ray.models.child import quiet_transformers
from puzzle_ray.scoring.metrics import mean
from puzzle_ray.store import Store

ATTENTION = ("gqa:50%", "gqa:25%", "gqa_prune:50%", "window:64", "linear")
FFN = ("ffn:75%", "ffn:50%", "ffn:25%", "ffn:10%", "ffn_iterative:50%", "linear")


def rows_of(setting: Setting, tokens: int) -> list[dict[str, Any]]:
    """One row a variant that was trained."""
    _, before, _ = setting.scored("decoupled", 0)
    library, after, _ = setting.scored("decoupled", tokens)
    losses = {(row.layer, row.kind, row.variant): row for row in library.rows()}
    rows = []
    for layer, attention, ffn in sorted(before):
        kind, variant = ("attention", attention) if attention != PARENT else ("ffn", ffn)
        row = losses[layer, kind, variant]
        if row.tokens:
            key = (layer, attention, ffn)
            rows.append(
                {"layer": layer, "kind": kind, "variant": variant, "kl_before": before[key], "kl_after": after[key]} | facts(row)
            )
    return rows


def facts(row: LibraryRow) -> dict[str, Any]:
    return {"loss_before": row.start_loss, "loss_after": row.final_loss, "kept": row.kept, "start": row.initialisation}


def table(rows: list[dict[str, Any]]) -> str:
    """A line a variant, a column a layer: KL before -> after."""
    layers = sorted({row["layer"] for row in rows})
    lines = [" " * 28 + "".join(f"{f'layer {layer}':>22}" for layer in layers)]
    for kind, variant in dict.fromkeys((row["kind"], row["variant"]) for row in rows):
        own = {row["layer"]: row for row in rows if (row["kind"], row["variant"]) == (kind, variant)}
        cells = (f"{own[n]['kl_before']:.5f} -> {own[n]['kl_after']:.5f}" if n in own else "" for n in layers)
        lines.append(f"{kind + ' ' + variant:<28}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", required=True, help="a Hugging Face folder or hub id")
    parser.add_argument("--text", required=True, help="text for the library; a part of it is held out for the scores")
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--quick", action="store_true", help=f"at most {QUICK_TOKENS} tokens, {QUICK_HELDOUT_TOKENS} held-out ones"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokens = min(given.tokens, QUICK_TOKENS) if given.quick else given.tokens
    heldout, calibration = (QUICK_HELDOUT_TOKENS, 4_096) if given.quick else (16_384, 16_384)
    with quiet_transformers(), tempfile.TemporaryDirectory() as folder:
        setting = Setting(given.parent, given.text, Store(folder), heldout, calibration, (ATTENTION, FFN), "subblock")
        rows = rows_of(setting, tokens)
    print(table(rows))
    worse = [f"{row['layer']}: {row['kind']} {row['variant']}" for row in rows if row["kl_after"] >= row["kl_before"]]
    summary = {
        "tokens": tokens,
        "heldout_tokens": sum(ids.numel() for ids in setting.texts),
        "variants": len(rows),
        "better": len(rows) - len(worse),
        "not_better": worse,
        "kl_before": mean([row["kl_before"] for row in rows]),
        "kl_after": mean([row["kl_after"] for row in rows]),
    }
    for name, value in summary.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    write(given.out, rows, summary)


if __name__ == "__main__":
    main()
