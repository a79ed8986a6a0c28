"""How good a block library is after how many tokens, decoupled and coupled:
python -m benchmarks.bld_tokens --parent DIR --text FILE --tokens N --out FILE.json [--quick]

Libraries are trained in this process with 0, 1/8, 1/4, 1/2 and 1 times N tokens, each with a schedule of its own, on one narrowed space:
per layer the parent and two more attentions, the parent and two more FFNs. Decoupled training makes 4 variants of a layer, coupled
training its 8 pairs, every one of them on all tokens of the budget, so a coupled library costs about twice as much. Both are then judged
alike: the 8 exchanges of every layer are scored as blocks on the same held-out tokens, the decoupled library's pairs put together from
its halves. Exchanges of one half are trained alike in both modes; `kl_pairs` is the mean over those of both halves, where they differ.
`normalised_mse` is a mean over a library's own entries, so it compares budgets, not modes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer

from benchmarks.record import write
from puzzle_ray.artifacts import PARENT, SearchSpace
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.data.tokenising import tokenise
from puzzle_ray.distill.library import Library, build_serially
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.models.blocks import load_stack
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import quiet_transformers, read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.progress import Quiet
from puzzle_ray.scoring.metrics import mean
from puzzle_ray.scoring.serial import score_serially
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

ATTENTION, FFN, MULTIPLE = ("gqa:50%", "linear"), ("ffn:50%", "ffn:25%"), 4
SHARES = (0.125, 0.25, 0.5, 1.0)
MODES = ("decoupled", "coupled")
UNTRAINED = 1e-30  # a rate at which no fp32 weight moves
QUICK_TOKENS, QUICK_HELDOUT_TOKENS = 32_768, 2_048


class Setting:
    """A parent, text in its tokens, and what all libraries have in common."""

    def __init__(
        self,
        parent: str,
        text: str,
        store: Store,
        heldout_tokens: int,
        calibration_tokens: int,
        variants: tuple[tuple[str, ...], tuple[str, ...]] = (ATTENTION, FFN),
        granularity: Literal["block", "subblock"] = "block",
    ) -> None:
        self.parent, self.store = parent, store
        self.library = LibraryConfig(calibration_tokens=calibration_tokens)
        self.scoring = ScoringConfig(granularity=granularity, tokens=heldout_tokens)
        folder = locate(parent)
        config = read_config(folder)
        data = DataConfig(train=text)
        self.train, heldout = tokenise(data, AutoTokenizer.from_pretrained(folder), config.max_position_embeddings)
        self.stack = load_stack(folder, describe(config), config, 0, config.num_hidden_layers, torch.float32)
        self.texts = heldout.first(heldout_tokens, self.scoring.micro_batch_tokens // data.sequence_length)
        self.space = search_space(config, *variants, MULTIPLE)

    def scored(self, mode: str, tokens: int) -> tuple[Library, dict[tuple[int, str, str], float], float]:
        """One library, the KL of every exchange, and the CPU seconds of its training; 0 tokens is every variant as it starts."""
        layers = (replace(layer, coupled=mode == "coupled") for layer in self.space.layers)
        space = SearchSpace(tuple(layers))
        changes = {"tokens": tokens} if tokens else {"tokens": self.library.micro_batch_tokens, "learning_rate": UNTRAINED}
        inputs = {"mode": mode, "tokens": str(tokens)}
        started = time.process_time()
        step = self.store.artifact("library", {}, inputs)
        library = build_serially(self.parent, space, self.library.model_copy(update=changes), self.train, 0, step, Quiet())
        trained_s = time.process_time() - started
        scores_step = self.store.artifact("scores", {}, inputs)
        scores = score_serially(self.stack, self.texts, space, self.scoring, scores_step, library.states, Quiet())
        kl = {(r.layer, r.attention, r.ffn): r.value for r in scores.rows if r.metric == "kl"}
        return library, kl, trained_s

    def measure(self, mode: str, tokens: int) -> dict[str, Any]:
        """One library and its scores in figures."""
        library, kl, trained_s = self.scored(mode, tokens)
        rows = library.rows()
        return {
            "mode": mode,
            "tokens": tokens,
            "entries": len(rows),
            "entry_tokens": tokens * len(rows),
            "exchanges": len(kl),
            "kl": mean(list(kl.values())),
            "kl_halves": mean([value for (_, *halves), value in kl.items() if PARENT in halves]),
            "kl_pairs": mean([value for (_, *halves), value in kl.items() if PARENT not in halves]),
            "normalised_mse": mean([row.final_loss if row.kept == "trained" else row.start_loss for row in rows]),
            "train_cpu_s": trained_s,
            "kl_of": {f"{layer}: {attention} + {ffn}": value for (layer, attention, ffn), value in kl.items()},
        }


def summary_of(rows: list[dict[str, Any]], setting: Setting) -> dict[str, Any]:
    """KL before any training and after the whole budget, which exchanges it did not better, and what part of the gain each budget gave."""
    found = {(row["mode"], row["tokens"]): row for row in rows}
    most = max(row["tokens"] for row in rows)
    start = found["decoupled", 0]
    summary: dict[str, Any] = {
        "layers": len(setting.space.layers),
        "space": [list(setting.space.layers[0].attention), list(setting.space.layers[0].ffn)],
        "exchanges_scored": start["exchanges"],
        "heldout_tokens": sum(ids.numel() for ids in setting.texts),
        "tokens": most,
        "kl_untrained": start["kl"],
        "kl_pairs_untrained": start["kl_pairs"],
    }
    for mode in MODES:
        end = found[mode, most]
        own = [row for row in rows if row["mode"] == mode]
        summary |= {f"{mode}_entries": end["entries"], f"{mode}_kl": end["kl"], f"{mode}_kl_pairs": end["kl_pairs"]}
        summary[f"{mode}_not_better"] = [name for name, kl in end["kl_of"].items() if kl >= start["kl_of"][name]]
        summary[f"{mode}_share_of_gain"] = {
            row["tokens"]: (start["kl"] - row["kl"]) / (start["kl"] - end["kl"]) for row in own if start["kl"] != end["kl"]
        }
    summary["halves_alike"] = found["decoupled", most]["kl_halves"] == found["coupled", most]["kl_halves"]
    summary["coupled_over_decoupled_kl_pairs"] = summary["coupled_kl_pairs"] / summary["decoupled_kl_pairs"]
    return summary


def table(rows: list[dict[str, Any]]) -> str:
    names = ("mode", "tokens", "entries", "entry_tokens", "kl", "kl_halves", "kl_pairs", "normalised_mse", "train_cpu_s")
    lines = ["".join(f"{name:>15}" for name in names)]
    for row in rows:
        cells = (f"{row[name]:.5f}" if isinstance(row[name], float) else str(row[name]) for name in names)
        lines.append("".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", required=True, help="a Hugging Face folder or hub id")
    parser.add_argument("--text", required=True, help="text for the libraries; a part of it is held out for the scores")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="the largest budget")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--quick", action="store_true", help=f"at most {QUICK_TOKENS} tokens, {QUICK_HELDOUT_TOKENS} held-out ones"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    most = min(given.tokens, QUICK_TOKENS) if given.quick else given.tokens
    heldout, calibration = (QUICK_HELDOUT_TOKENS, 4_096) if given.quick else (16_384, 16_384)
    with quiet_transformers(), tempfile.TemporaryDirectory() as folder:
        setting = Setting(given.parent, given.text, Store(folder), heldout, calibration)
        budgets = [("decoupled", 0), *((mode, int(share * most)) for mode in MODES for share in SHARES)]
        rows = [setting.measure(mode, tokens) for mode, tokens in budgets]
    summary = summary_of(rows, setting)
    print(table(rows))
    for name, value in summary.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    write(given.out, rows, summary)


if __name__ == "__main__":
    main()
