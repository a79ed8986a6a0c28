"""What a profile says of served children against what their server does: python -m benchmarks.serving_prediction --out FILE.json

For every parent two children of random weights are made: of narrow FFNs, fewer KV heads and no-ops, and one with linear blocks besides.
First comes the prediction, by a profile of the shapes alone. Then one server has the parent, its children and an empty model (of
nothing but no-ops). It says what a request costs beside its model: the prediction's `request_ms`. Last, 16 users at once ask parent and
children for streams, one model after the other, in many short turns. Of each model's turns the lower quartile counts: other work on the
machine only adds to a turn. Standard errors are those of drawing the turns again.

- `torch`, `puzzle`: the prediction by a profile of that engine, in CPU time of the process, as the measurement is of the replica.
- `puzzle with HTTP`: with `profile.request_ms` besides, which is what HTTP and Ray Serve add to a request in the replica.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import write
from benchmarks.serving import BATCH, PROCESSES, loads, served, timed
from benchmarks.serving_clients import Load, Target, closed_loop
from puzzle_ray.artifacts import LayerChoice, Scenario
from puzzle_ray.models.child import copy_tokenizer, load_model, new_child, read_config
from puzzle_ray.process import compute_with
from puzzle_ray.profiling.engine import Engine
from puzzle_ray.profiling.engines.puzzle_engine import PuzzleEngine
from puzzle_ray.profiling.engines.torch_engine import TorchEngine
from puzzle_ray.profiling.measure import profile_serially
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.progress import Display
from puzzle_ray.search.tables import predicted_costs
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

PARENT, EMPTY, WITH_HTTP = "parent", "empty", "puzzle with HTTP"
EACH, FEW_TOKENS, QUANTILE = 4, 8, 0.25  # with one request a user, not all are at work at the ends of a turn
Predictions = Mapping[str, Mapping[str, float]]  # engine -> model -> CPU milliseconds of a token of the answers


class TorchByCpuTime(TorchEngine):
    """Engine `torch` in CPU time."""

    name = "torch by CPU time"

    def _now(self, device: torch.device) -> float:
        return time.process_time()


class PuzzleByCpuTime(PuzzleEngine):
    """Engine `puzzle` in CPU time."""

    name = "puzzle by CPU time"

    def __init__(self) -> None:
        super().__init__(time.process_time)


BY_CPU_TIME: Mapping[str, Engine] = {"torch": TorchByCpuTime(), "puzzle": PuzzleByCpuTime()}
TORCH, PUZZLE = BY_CPU_TIME["torch"], BY_CPU_TIME["puzzle"]  # what profiles find by dotted path


def children_of(config: Any) -> dict[str, tuple[LayerChoice, ...]]:
    """Architectures by name: of shapes alone, and with linear blocks."""
    width = config.intermediate_size // 16 * 8
    kinds = {
        "narrow": (LayerChoice("gqa:1", f"ffn:{width}"), LayerChoice("noop", "parent"), LayerChoice("gqa:1", "noop")),
        "linear": (LayerChoice("linear", f"ffn:{width}"), LayerChoice("gqa:1", "linear")),
    }
    layers = range(config.num_hidden_layers)
    return {
        name: tuple(kind[index // 2 % len(kind)] if index % 2 else LayerChoice() for index in layers)
        for name, kind in kinds.items()
    }


def predicted(
    config: Any, architectures: Mapping[str, Sequence[LayerChoice]], scenario: Scenario, engine: str, repeats: int
) -> dict[str, float]:
    """CPU milliseconds of a token of the answers, by a profile."""
    kinds = ("attention", "ffn")
    attention, ffn = (
        tuple(dict.fromkeys(choice.variant(kind) for choices in architectures.values() for choice in choices))  # type: ignore[arg-type]
        for kind in kinds
    )
    space = search_space(config, ("noop", *attention), ("noop", *ffn), 8)
    settings = ProfileConfig(engine=f"{__spec__.name}:{engine.upper()}", scenario=scenario, repeats=repeats)
    with tempfile.TemporaryDirectory() as folder:
        profile = profile_serially(config, space, settings, Store(folder).artifact("profile", {}, {}), Display())
    tokens = scenario.batch_size * scenario.output_tokens
    return {
        name: predicted_costs(space, profile, scenario, tuple(each)).runtime_ms / tokens for name, each in architectures.items()
    }


def request_ms(target: Target, empty: Any, load: Load, rounds: int) -> float:
    """What HTTP and Ray Serve add to a request in the replica: answers of a few tokens by an empty model, there and in engine `puzzle`."""
    few = replace(load, new_tokens=(FEW_TOKENS,))
    scenario = Scenario(BATCH, len(load.prompts[0].token_ids), FEW_TOKENS)
    added = []
    for _ in range(rounds):
        seen = timed(lambda: asyncio.run(closed_loop(target, few, BATCH, 2)), PROCESSES[PARENT])
        prefill_ms, decode_ms = PUZZLE.time_once(empty, scenario)
        own_ms = (prefill_ms + (FEW_TOKENS - 1) * decode_ms) / BATCH
        added.append(FEW_TOKENS * seen["engine_cpu_ms_per_token"] - own_ms)
    return float(np.median(added[1:]))  # the first warms up


def turns_of(targets: Mapping[str, Target], load: Load, number: int, each: int) -> list[dict[str, dict[str, Any]]]:
    """What each model took in each turn."""
    found: list[dict[str, dict[str, Any]]] = []
    for turn in range(number + 1):
        order = list(targets) if turn % 2 else list(reversed(targets))
        run = {name: partial(asyncio.run, closed_loop(targets[name], load, BATCH, each if turn else 1)) for name in order}
        found.append({name: timed(run[name], PROCESSES[PARENT]) for name in order})
    return found[1:]


def ratio_of(parent: Any, child: Any) -> float:
    """Other work on the machine only adds to a turn's time. So the lower quartile of the turns counts."""
    return float(np.quantile(parent, QUANTILE) / np.quantile(child, QUANTILE))


def row_of(
    name: str, by: Predictions, added_ms: float, turns: Sequence[Mapping[str, Mapping[str, Any]]], answer: int
) -> dict[str, Any]:
    """A child beside its parent. `added_ms`: of a request."""
    cpu_ms = {each: np.array([turn[each]["engine_cpu_ms_per_token"] for turn in turns]) for each in (PARENT, name)}
    measured, again = ratio_of(cpu_ms[PARENT], cpu_ms[name]), np.random.default_rng(0)
    drawn = [again.integers(len(turns), size=len(turns)) for _ in range(500)]
    ratios = [ratio_of(cpu_ms[PARENT][which], cpu_ms[name][which]) for which in drawn]
    walls = {each: np.array([1e3 / turn[each]["tokens_per_s"] for turn in turns]) for each in cpu_ms}
    said = {engine: each[PARENT] / each[name] for engine, each in by.items()}
    said[WITH_HTTP] = (by["puzzle"][PARENT] + added_ms / answer) / (by["puzzle"][name] + added_ms / answer)
    return {
        "child": name, "answer_tokens": answer, "turns": len(turns), "request_ms": added_ms,
        "predicted": said, "measured_by_cpu_time": measured,
        "measured_by_cpu_time_stderr": float(np.std(ratios)), "measured_by_wall": ratio_of(walls[PARENT], walls[name]),
        "off": {engine: value / measured - 1 for engine, value in said.items()},
        "served_cpu_ms_per_token": {each: float(np.quantile(values, QUANTILE)) for each, values in cpu_ms.items()},
        "predicted_cpu_ms_per_token": {engine: {PARENT: each[PARENT], name: each[name]} for engine, each in by.items()},
    }  # fmt: skip


def measure(parent: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one parent."""
    options.poisson_tokens, options.arrivals, options.new_tokens = 8, 1, options.answers[0]
    load, _ = loads(parent, options.text, options)
    config = read_config(parent)
    architectures = {PARENT: (LayerChoice(),) * config.num_hidden_layers, **children_of(config)}
    by = {
        answer: {
            engine: predicted(config, architectures, Scenario(BATCH, options.prompt_tokens, answer), engine, options.repeats)
            for engine in options.engines
        }
        for answer in options.answers
    }
    rows = []
    with tempfile.TemporaryDirectory() as root, ExitStack() as stack:
        folders = {PARENT: parent}
        for name, choices in {**architectures, EMPTY: (LayerChoice("noop", "noop"),) * config.num_hidden_layers}.items():
            if name != PARENT:
                folders[name] = Path(root) / name
                new_child(config, list(choices), torch.float32).save_pretrained(folders[name])
                copy_tokenizer(parent, folders[name])
        url = stack.enter_context(served({name: str(folder) for name, folder in folders.items()}, 1, "float32"))
        targets = {name: Target(url, name) for name in folders}
        added_ms = request_ms(targets.pop(EMPTY), load_model(folders[EMPTY], torch.float32), load, options.turns + 1)
        for answer in options.answers:
            turns = turns_of(targets, replace(load, new_tokens=(answer,)), options.turns, options.each)
            for name in list(architectures)[1:]:
                rows.append({"parent": parent.name, **row_of(name, by[answer], added_ms, turns, answer)})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--parent", type=Path, action="append", required=True, help="a model folder with a tokenizer; several by several"
    )
    parser.add_argument("--text", type=Path, required=True, help="a file that prompts are cut from")
    parser.add_argument("--answers", type=int, nargs="+", default=[64, 256], help="lengths in tokens")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--engines", nargs="+", choices=tuple(BY_CPU_TIME), default=list(BY_CPU_TIME), help="puzzle among them")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--each", type=int, default=EACH, help="requests of a user in a turn")
    parser.add_argument("--repeats", type=int, default=7, help="of the profile")
    options = parser.parse_args()
    if "puzzle" not in options.engines:
        parser.error("--engines needs puzzle, which request_ms is added to")
    compute_with(1)
    rows: list[dict[str, Any]] = []
    for parent in options.parent:
        rows += measure(parent, options)
        off = {
            f"largest_error_by_{name.replace(' ', '_')}": max(abs(row["off"][name]) for row in rows)
            for name in (*options.engines, WITH_HTTP)
        }
        write(options.out, rows, off)
    print(json.dumps(off, indent=1))


if __name__ == "__main__":
    main()
