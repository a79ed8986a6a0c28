"""Predicted against measured cost of random architectures on this CPU: python -m benchmarks.fidelity --out FILE.json [--quick]

Profiles the parent's shapes (by default those of the tiny parent, with random weights: only shapes cost), then measures the parent
and architectures drawn at random from the search space, side by side. Runtime is a prefill and the decode steps after it. With
`--engine roofline` what is measured is held against an estimate from this CPU's probed peaks, in place of a profile.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from benchmarks.record import write
from puzzle_ray.artifacts import LayerChoice, Profile, Scenario, SearchSpace
from puzzle_ray.evaluation.evaluate import speeds
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import new_child, read_config
from puzzle_ray.profiling.engine import measure_side_by_side
from puzzle_ray.profiling.measure import profile_serially
from puzzle_ray.profiling.memory import model_memory_mib
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.progress import Display
from puzzle_ray.recipes.tiny_parent import TinyParentSpec, model_config
from puzzle_ray.search.tables import predicted_costs
from puzzle_ray.store import Store
from puzzle_ray.variants.space import SpaceConfig, search_space

PARENT = "parent"


def tiny_config() -> LlamaConfig:
    """The tiny parent's shapes."""
    return model_config(TinyParentSpec())


def drawn(space: SearchSpace, count: int, seed: int) -> dict[str, tuple[LayerChoice, ...]]:
    """The parent, and architectures with every layer drawn at random, from hardly to strongly compressed."""
    rng = random.Random(seed)
    found = {PARENT: (LayerChoice(),) * len(space.layers)}
    for number in range(count):
        kept = number / count  # the share of subblocks that stay the parent's by design; the others may by chance
        found[f"random {number + 1}"] = tuple(
            LayerChoice(
                PARENT if rng.random() < kept else rng.choice(layer.attention),
                PARENT if rng.random() < kept else rng.choice(layer.ffn),
            )
            for layer in space.layers
        )
    return found


def compared(
    config: Any, space: SearchSpace, profile: Profile, settings: ProfileConfig, architectures: dict[str, tuple[LayerChoice, ...]]
) -> list[dict[str, Any]]:
    """One row per architecture; errors are predicted / measured - 1."""
    models = {name: new_child(config, choices, getattr(torch, settings.dtype)).eval() for name, choices in architectures.items()}
    measured = speeds(measure_side_by_side(models, settings.scenario, settings.repeats), settings.scenario)
    rows = []
    for name, choices in architectures.items():
        costs, found = predicted_costs(space, profile, settings.scenario, choices), measured[name]
        row: dict[str, Any] = {"architecture": name, "choices": [choice.label for choice in choices]}
        for cost in ("prefill_ms", "decode_ms", "runtime_ms", "throughput_tokens_per_s"):
            row[f"predicted_{cost}"], row[f"measured_{cost}"] = getattr(costs, cost), found[cost]
            row[f"{cost}_error"] = getattr(costs, cost) / found[cost] - 1
        row["predicted_memory_mib"] = costs.memory_mib
        row["measured_memory_mib"] = model_memory_mib(models[name], settings.scenario)
        rows.append(row)
    return rows


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    error = "throughput_tokens_per_s_error"
    predicted, measured = ([row[f"{kind}_throughput_tokens_per_s"] for row in rows] for kind in ("predicted", "measured"))
    ranks = [np.argsort(np.argsort(values)) for values in (predicted, measured)]
    return {
        "median_abs_error": float(np.median([abs(row[error]) for row in rows if row["architecture"] != PARENT])),
        "max_abs_error": max(abs(row[error]) for row in rows),
        "rank_correlation": float(np.corrcoef(*ranks)[0, 1]),
        "parent_error": next(row[error] for row in rows if row["architecture"] == PARENT),
        "memory_exact": all(row["predicted_memory_mib"] == row["measured_memory_mib"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parent", help="a model folder or hub id in place of the tiny parent's shapes")
    parser.add_argument(
        "--engine", choices=("torch", "roofline"), default="torch", help="what predicts: measurements, or an estimate"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="4 architectures, 3 repeats")
    arguments = parser.parse_args()
    config = read_config(locate(arguments.parent)) if arguments.parent else tiny_config()
    variants = SpaceConfig()
    space = search_space(config, variants.attention, variants.ffn, variants.ffn_multiple_of)
    device = "cpu" if arguments.engine == "roofline" else None
    repeats = 3 if arguments.quick else arguments.repeats
    settings = ProfileConfig(engine=arguments.engine, device=device, scenario=Scenario(16, 256, 32), repeats=repeats)
    with tempfile.TemporaryDirectory() as folder:
        profile = profile_serially(config, space, settings, Store(folder).artifact("profile", {}, {}), Display())
    rows = compared(config, space, profile, settings, drawn(space, 4 if arguments.quick else 12, seed=0))
    word = "ESTIMATED" if profile.estimated else "predicted"
    print(f"{'architecture':>14} {'prefill ms':>17} {'decode ms':>17} {'runtime ms':>17} {'error':>7}   {word} / measured")
    for row in rows:
        times = (f"{row[f'predicted_{t}']:8.2f}/{row[f'measured_{t}']:8.2f}" for t in ("prefill_ms", "decode_ms", "runtime_ms"))
        print(f"{row['architecture']:>14} {' '.join(times)} {row['runtime_ms_error']:+7.1%}")
    summary = summary_of(rows) | {"estimated": profile.estimated}
    print(", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in summary.items()))
    write(arguments.out, rows, summary)


if __name__ == "__main__":
    main()
