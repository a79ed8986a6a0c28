"""What prefix reuse and the Fisher shortlist save, and what they change: python -m benchmarks.scoring --out FILE.json [--quick]

A block library is trained (or found in --store) for the tiny parent, or for --parent on --data. Then every variant is scored three
ways on the same text in one process with one thread: by the whole child's forward, by running only the layers from the exchanged one on
(what the product does), and by Fisher estimates. In theory prefix reuse saves 2L / (L + 1) of the layers' time, as exchanges are
spread evenly over L layers; the final norm, head and metrics, which cost the same both ways, are timed apart.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.record import write
from jobs.run import Run
from jobs.session import connected
from jobs.stages import library, tokens
from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.config import load
from puzzle_ray.models.blocks import load_stack
from puzzle_ray.models.child import assemble
from puzzle_ray.models.describe import describe
from puzzle_ray.scoring import fisher
from puzzle_ray.scoring.metrics import compare_predictions, mean
from puzzle_ray.scoring.replacements import Damage, Replacement, ScoringTask, all_replacements
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.scoring.shard import ShardScorer

QUICK = ("library.tokens=20480", "scoring.tokens=4096")


class Setting:
    """A parent with its library, and the text to score on."""

    def __init__(self, run: Run, texts: Sequence[Tensor]) -> None:
        self.folder, self.config, self.space = run.parent.folder, run.parent.model_config, run.space
        self.library, self.texts = library.read(run), list(texts)
        self.stack = load_stack(self.folder, describe(self.config), self.config, 0, self.config.num_hidden_layers, torch.float32)
        self.items = all_replacements(self.space, "subblock")
        self.batches = tuple(range(len(self.texts)))
        self.scorer = ShardScorer(self.stack, self.texts)

    @property
    def num_layers(self) -> int:
        return len(self.space.layers)

    def child(self, item: Replacement) -> Any:
        choices = [item.choice if index == item.layer else LayerChoice() for index in range(self.num_layers)]
        states = {(item.layer, kind): state for kind, state in self.library.states(item.layer, item.choice).items()}
        return assemble(self.folder, self.config, choices, states, torch.float32)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Seconds of this process' CPU: with one thread the wall clock of a quiet machine, and other processes do not count."""
    started = time.process_time()
    found = work()
    return found, time.process_time() - started


@torch.no_grad()
def whole_forward(setting: Setting, item: Replacement) -> tuple[Damage, float, float]:
    """(damage, seconds in the layers, seconds in head and metrics) of a whole child, as transformers runs it."""
    child, parts, layers_s, head_s = setting.child(item), [], 0.0, 0.0
    for number, ids in enumerate(setting.texts):
        hidden, seconds = timed(lambda ids=ids: child.model(ids, use_cache=False).last_hidden_state)
        layers_s += seconds
        kept = setting.scorer.parent[number]
        assert kept.log_probs is not None

        def measured(ids: Tensor = ids, hidden: Tensor = hidden, kept: Any = kept) -> Damage:
            return Damage.of(compare_predictions(kept.log_probs, child.lm_head(hidden), ids, kept.hidden, hidden), kept.loss)

        damage, seconds = timed(measured)
        parts.append(damage)
        head_s += seconds
    return Damage.joined(parts), layers_s, head_s


def score_each(setting: Setting) -> tuple[list[dict[str, Any]], dict[Replacement, Damage]]:
    """Every item by the whole forward and by prefix reuse, one right after the other."""
    rows, exact = [], {}
    for item in setting.items:
        states = setting.library.states(item.layer, item.choice)
        whole, whole_layers_s, whole_head_s = whole_forward(setting, item)
        task = ScoringTask((item,), setting.batches)
        leaving, layers_s = timed(lambda task=task, states=states: setting.scorer.run_replacements(task, lambda *_: states))
        (parts,), head_s = timed(lambda task=task, leaving=leaving: setting.scorer.measure(task, leaving))
        exact[item] = damage = Damage.joined(parts)
        rows.append(
            {
                "layer": item.layer,
                "attention": item.choice.attention,
                "ffn": item.choice.ffn,
                "kl": mean(damage.values["kl"]),
                "bitwise_equal": damage == whole,
                "whole_layers_s": whole_layers_s,
                "whole_head_s": whole_head_s,
                "prefix_layers_s": layers_s,
                "prefix_head_s": head_s,
            }
        )
    return rows, exact


def fisher_estimates(setting: Setting, samples: int) -> tuple[dict[Replacement, float], float]:
    """(estimates, seconds), a text batch at a time."""
    config = ScoringConfig(granularity="subblock", shortlist="fisher", fisher_samples=samples)
    found: fisher.Estimates = {}

    def work() -> None:
        for batch in setting.batches:
            part, _ = fisher.shard_estimates(setting.scorer, (batch,), None, setting.space, config, setting.library.states)
            for key, values in part.items():
                found.setdefault(key, []).extend(values)

    _, seconds = timed(work)
    return {item: mean(found[fisher.estimate_key(item)]) for item in setting.items}, seconds


def candidate_batches(run: Run, setting: Setting, sequences: Sequence[int]) -> list[dict[str, Any]]:
    """Seconds for one early layer's candidates, alone and four at a time, for evaluation batches of some sizes."""
    layer = 0
    items = tuple(item for item in setting.items if item.layer == layer)[:8]
    rows = []
    for count in sequences:
        texts = tokens.read(run)[1].first(4096, count)
        scorer = ShardScorer(setting.stack, texts)
        scorer.run_parent()
        batches = tuple(range(len(texts)))
        row: dict[str, Any] = {"tokens_per_batch": int(texts[0].numel())}
        for size in (1, 4):
            tasks = [ScoringTask(items[start : start + size], batches) for start in range(0, len(items), size)]

            def work(scorer: ShardScorer = scorer, tasks: Sequence[ScoringTask] = tasks) -> None:
                for task in tasks:
                    scorer.measure(task, scorer.run_replacements(task, setting.library.states))

            row[f"candidate_batch_{size}_s"] = min(timed(work)[1] for _ in range(3))
        row["speedup_of_4"] = row["candidate_batch_1_s"] / row["candidate_batch_4_s"]
        rows.append(row)
    return rows


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parent", help="a model folder or hub id in place of the tiny parent; needs --data")
    parser.add_argument("--data", help="text for the library and the scores")
    parser.add_argument("--store", help="where parent and library are kept, and found again")
    parser.add_argument("--set", action="append", default=[], dest="settings", help="section.key=value, as for the jobs")
    parser.add_argument("--quick", action="store_true", help="a quarter of the library's tokens, half of the scores'")
    arguments = parser.parse_args()
    given = [f"parent={arguments.parent}"] if arguments.parent else []
    given += [f"data.train={arguments.data}"] if arguments.data else []
    with tempfile.TemporaryDirectory() as folder:
        store = f"store={arguments.store or folder}"
        run = Run(load("tiny", None, (*(QUICK if arguments.quick else ()), *given, store, *arguments.settings)))
        run.check()
        with connected(run.config.cluster):
            run.done("library")
        measure(run, arguments.out)


def measure(run: Run, out: Path) -> None:
    torch.set_num_threads(1)
    scoring = run.config.scoring
    length = run.config.data.sequence_length
    setting = Setting(run, tokens.read(run)[1].first(scoring.tokens, scoring.micro_batch_tokens // length))
    _, parent_s = timed(lambda: setting.scorer.run_parent())
    rows, exact = score_each(setting)
    kl = [mean(exact[item].values["kl"]) for item in setting.items]
    exact_s = parent_s + sum(row["prefix_layers_s"] + row["prefix_head_s"] for row in rows)
    theory = 2 * setting.num_layers / (setting.num_layers + 1)
    total = {name: sum(row[name] for row in rows) for name in rows[0] if name.endswith("_s")}
    summary: dict[str, Any] = {
        "layers": setting.num_layers,
        "candidates": len(rows),
        "tokens": sum(ids.numel() for ids in setting.texts),
        "bitwise_equal": all(row["bitwise_equal"] for row in rows),
        "prefix_speedup": total["whole_layers_s"] / total["prefix_layers_s"],
        "prefix_theory": theory,
        "prefix_speedup_over_theory": total["whole_layers_s"] / total["prefix_layers_s"] / theory,
        "prefix_speedup_with_head_and_metrics": (total["whole_layers_s"] + total["whole_head_s"])
        / (total["prefix_layers_s"] + total["prefix_head_s"]),
        "exact_s": exact_s,
    }
    for samples in (1, 4):
        estimates, seconds = fisher_estimates(setting, samples)
        found = [estimates[item] for item in setting.items]
        of_layer = [[n for n, item in enumerate(setting.items) if item.layer == index] for index in range(setting.num_layers)]
        suffix = "" if samples == 1 else f"_{samples}_samples"
        summary[f"fisher_spearman{suffix}"] = spearman(found, kl)
        inside = [spearman([found[n] for n in own], [kl[n] for n in own]) for own in of_layer]
        summary[f"fisher_spearman_within_layers{suffix}"] = float(np.mean(inside))
        summary[f"fisher_s{suffix}"] = parent_s + seconds
        summary[f"fisher_time_share{suffix}"] = (parent_s + seconds) / exact_s
        for row, item in zip(rows, setting.items, strict=True):
            row[f"fisher{suffix}"] = estimates[item]
    summary["candidate_batch"] = candidate_batches(run, setting, (1, 2, 8))
    for name, value in summary.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    write(out, rows, summary)


if __name__ == "__main__":
    main()
