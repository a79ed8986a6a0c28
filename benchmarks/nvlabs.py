"""Reads the block library that NVlabs published with Puzzle (github.com/NVlabs/puzzle, `block_library.json`).

A JSON object `{layer: {variant: {"stats": {...}, "metrics": {...}}}}`. Stats of a block are `memory_mib` (weights and
KV cache of the whole batch), `runtime_ms` (of the whole scenario, at the batch size and sequence length of
`measurement_info.json`) and `num_params`; metrics are `kl_div` and `lm_loss` of the parent with that one block
replaced. Embedding and head are not in it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from puzzle_ray.artifacts import FIXED, MIB, PARENT, LayerSpace, Profile, ProfileRow, Scenario, ScoreRow, Scores, SearchSpace
from puzzle_ray.errors import ConfigError
from puzzle_ray.search.problem import Floats, Limit, Problem

COST_NAMES = ("memory_mib", "runtime_ms", "num_params")
PARENT_STATS = "parent_block_stats.json"
MEASUREMENT = "measurement_info.json"


@dataclass(frozen=True, eq=False)
class NvlabsLibrary:
    """Scores [R, V] as differences from the parent, by metric; costs [3, R, V] in the order of COST_NAMES."""

    labels: tuple[tuple[str, ...], ...]
    scores: dict[str, Floats]
    costs: Floats
    parent_metrics: dict[str, float]
    parent_costs: tuple[float, ...]
    batch_size: int
    sequence_length: int

    def offset(self, metric: str) -> float:
        """What a sum of the file's own scores has on top of the objective: the parent's metric, once per layer."""
        return len(self.labels) * self.parent_metrics[metric]

    def problem(
        self,
        metric: str = "kl_div",
        *,
        memory_mib: float | None = None,
        runtime_ms: float | None = None,
        memory_fraction: float | None = None,
        runtime_fraction: float | None = None,
        throughput_tokens_per_s: float | None = None,
    ) -> Problem:
        """The search under these limits; throughput is batch_size * sequence_length / runtime. Raises ConfigError."""
        if metric not in self.scores:
            raise ConfigError("metric", f"the library has no {metric!r}", f"it has {', '.join(self.scores)}")
        tokens = 1000.0 * self.batch_size * self.sequence_length
        memory, runtime, _ = self.parent_costs
        limits = []
        for name, cost, of, asked, unit in (
            ("memory_mib", 0, 1.0, memory_mib, "MiB"),
            ("runtime_ms", 1, 1.0, runtime_ms, "ms"),
            ("memory_fraction", 0, memory, memory_fraction, "of the parent"),
            ("runtime_fraction", 1, runtime, runtime_fraction, "of the parent"),
        ):
            if asked is not None:
                limits.append(Limit(name, cost, asked * of, asked, unit, of=of))
        if (speed := throughput_tokens_per_s) is not None:
            limits.append(Limit("throughput_tokens_per_s", 1, tokens / speed, speed, "tokens/s", over=tokens))
        weights = np.ones(len(self.labels), dtype=np.intp)
        zeros = np.zeros(len(COST_NAMES))
        return Problem(self.scores[metric], self.costs, COST_NAMES, zeros, weights, self.labels, tuple(limits))


def as_run(library: NvlabsLibrary, metric: str = "kl_div") -> tuple[SearchSpace, Scores, Profile, Scenario]:
    """The library in this package's own terms, as a run's search and sweep read it.

    A block's variant stands as an attention variant beside the parent's FFN; its whole runtime is a prefill.
    """
    scenario = Scenario(library.batch_size, library.sequence_length - 1, 1)
    tokens = {name: getattr(scenario, name) for name in ("batch_size", "input_tokens", "output_tokens")}
    names = tuple([PARENT, *(f"block:{v}" for v in range(1, len(library.labels[0])))])
    spread = {"prefill_spread_ms": 0.0, "decode_spread_ms": 0.0}
    free = {"prefill_ms": 0.0, "decode_ms": 0.0, "weight_bytes": 0, "kv_bytes_per_token": 0, "num_params": 0}
    layers, scores, rows = [], [], [ProfileRow("", FIXED, FIXED, **tokens, **spread, **free)]  # type: ignore[arg-type]
    for layer in range(len(library.labels)):
        shape = f"layer_{layer}"
        layers.append(LayerSpace(names, (PARENT,), shape))
        rows.append(ProfileRow(shape, "ffn", PARENT, **tokens, **spread, **free))  # type: ignore[arg-type]
        for v, name in enumerate(names):
            memory_mib, runtime_ms, params = library.costs[:, layer, v]
            cost = {"prefill_ms": runtime_ms, "weight_bytes": round(memory_mib * MIB), "num_params": int(params)}
            rows.append(ProfileRow(shape, "attention", name, **tokens, **spread, **(free | cost)))  # type: ignore[arg-type]
            scores.append(ScoreRow(layer, name, PARENT, metric, float(library.scores[metric][layer, v]), 0.0, 0))
    profile = Profile(tuple(rows), "tensorrt_llm", "", "H100", "fp8")
    return SearchSpace(tuple(layers)), Scores(tuple(scores), "block"), profile, scenario


def read_nvlabs(path: str | Path) -> NvlabsLibrary:
    """Reads a folder of block_library.json, measurement_info.json and parent_block_stats.json. Raises ConfigError."""
    folder = Path(path)
    library, measured, parent = (_json(folder / name) for name in ("block_library.json", MEASUREMENT, PARENT_STATS))
    blocks = [list(layer.values()) for layer in library.values()]
    if len({len(row) for row in blocks}) != 1:
        raise ConfigError(str(folder), "its layers have differing numbers of variants", "give every layer the same ones")
    parent_metrics = {name: float(value) for name, value in parent["metrics"].items()}
    scores = {
        name: np.array([[block["metrics"][name] for block in row] for row in blocks], dtype=np.float64) - value
        for name, value in parent_metrics.items()
    }
    costs = np.array([[[block["stats"][name] for block in row] for row in blocks] for name in COST_NAMES], dtype=np.float64)
    return NvlabsLibrary(
        labels=tuple(tuple(layer) for layer in library.values()),
        scores=scores,
        costs=costs,
        parent_metrics=parent_metrics,
        parent_costs=tuple(len(blocks) * float(parent["stats"][name]) for name in COST_NAMES),
        batch_size=int(measured["batch_size"]),
        sequence_length=int(measured["sequence_length"]),
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(str(path), "there is no such file", "name the folder that holds NVlabs' block_library.json") from None
    except json.JSONDecodeError as error:
        raise ConfigError(str(path), f"is not JSON ({error})", "fetch it again") from None
