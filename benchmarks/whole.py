"""The tiny recipe from nothing to a distilled child, beside a uniformly narrowed child of the same measured speed.

The uniform child narrows every layer alike: the FFN, and the KV heads where the FFN alone does not reach the speed. It gets what the
searched child got: the same tokens of block distillation for its blocks, the same tokens of global distillation.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.record import write
from jobs.run import Run
from jobs.session import connected
from jobs.stages import architecture, assembly, evaluation, gkd, profile
from puzzle_ray.artifacts import PARENT, LayerChoice
from puzzle_ray.config import load
from puzzle_ray.store import Artifact

QUICK = ("library.tokens=20480", "gkd.tokens=40960", "scoring.tokens=4096", "evaluate.tokens=8192")


@contextmanager
def peak_memory_gib() -> Iterator[list[float]]:
    """Sampled twice a second: the proportional set size of this process and all it started, shared memory counted once."""
    peak, stop = [0.0], threading.Event()

    def sample() -> None:
        me = psutil.Process()
        while not stop.wait(0.5):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            peak[0] = max(peak[0], total / 2**30)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def first_choice(run: Run) -> LayerChoice:
    """The mildest narrowing of every layer alike whose predicted runtime is the child's: fewer KV heads only where the FFN alone,
    at a tenth of its width, would not do."""
    steps = run.profile_config.scenario.output_tokens - 1
    size = run.profile_config.scenario.batch_size
    whole = run.parent.model_config.intermediate_size
    cost = {(r.subblock, r.variant): r.prefill_ms + steps * r.decode_ms for r in profile.read(run).rows if r.batch_size == size}
    widths = sorted(
        (whole if v == PARENT else int(v[4:]), ms) for (k, v), ms in cost.items() if k == "ffn" and v.startswith(("ffn:", PARENT))
    )
    found = architecture.read(run)
    saving = found.parent_predicted.runtime_ms - found.predicted.runtime_ms
    heads = [PARENT, *(v for v in run.space.layers[0].attention if v.startswith("gqa:"))]
    for attention in heads:
        saved_by_heads = cost["attention", PARENT] - cost["attention", attention]
        target = cost["ffn", PARENT] - saving / run.parent.model_config.num_hidden_layers + saved_by_heads
        width = float(np.interp(target, np.maximum.accumulate([ms for _, ms in widths]), [w for w, _ in widths]))
        if target >= widths[0][1] and width >= whole / 10:
            break
    return LayerChoice(attention, f"ffn:{max(8, int(width) // 8 * 8)}")


def compared(run: Run, uniform: Artifact) -> dict[str, Any]:
    """The parent, the searched and distilled child, and a uniform one, measured side by side."""
    folders = {"parent": run.parent.address, "child": run.content("gkd").path("child"), "uniform": uniform.path("child")}
    return evaluation.compare(run, folders)


def uniform_run(config: Any, choice: LayerChoice) -> Run:
    space = config.space.model_copy(update={"attention": (PARENT, choice.attention), "ffn": (PARENT, choice.ffn)})
    return Run(config.model_copy(update={"space": space}))


def uniform_child(run: Run) -> tuple[Run, LayerChoice, dict[str, Any]]:
    """The uniform child, not distilled yet, whose measured speed comes within 3 % of the child's (or nearest, after five tries)."""
    choice, tried = first_choice(run), {}
    layers = run.parent.model_config.num_hidden_layers
    while len(tried) < 5:
        other = uniform_run(run.config, choice)
        other.done("library")
        narrowed = assembly.of(other, [choice] * layers)
        found = compared(run, narrowed)
        searched, uniform = (found["models"][name]["measured_speedup"] for name in ("child", "uniform"))
        print(f"uniform {choice.label}: {uniform:.3f} x, child {searched:.3f} x", file=sys.stderr, flush=True)
        tried[choice] = (abs(uniform / searched - 1), other, choice, found)
        width = int(choice.ffn[4:])
        following = width + (16 if uniform > searched else -16)
        choice = LayerChoice(choice.attention, f"ffn:{following}")
        if (
            tried[LayerChoice(choice.attention, f"ffn:{width}")][0] <= 0.03
            or choice in tried
            or not 8 <= following < run.parent.model_config.intermediate_size
        ):
            break
    _, other, choice, found = min(tried.values(), key=lambda entry: entry[0])
    return other, choice, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--store", help="a folder to keep (default: a temporary one, so that nothing is reused)")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        words = (*(QUICK if arguments.quick else ()), *arguments.overrides, f"store={arguments.store or scratch!r}")
        run = Run(load("tiny", None, words))
        run.check()
        started = time.monotonic()
        with peak_memory_gib() as peak, connected(run.config.cluster):
            run.done("report")
            seconds = time.monotonic() - started
            other, choice, found = uniform_child(run)
            uniform = gkd.of(other, assembly.of(other, [choice] * run.parent.model_config.num_hidden_layers))
            final, predicted = compared(run, uniform), architecture.read(run).predicted_speedup
    models = final["models"]
    rows = [{"model": name, **figures} for name, figures in models.items()]
    rows += [{"stage": stage, "seconds": taken} for stage, taken in run.seconds.items()]
    summary = {
        "seconds": seconds,
        "peak_memory_gib": peak[0],
        "measured_speedup": models["child"]["measured_speedup"],
        "predicted_speedup": predicted,
        "uniform_speedup": models["uniform"]["measured_speedup"],
        "uniform_choice": choice.label,
        "child_loss": models["child"]["heldout_loss"],
        "uniform_loss": models["uniform"]["heldout_loss"],
        "parent_loss": models["parent"]["heldout_loss"],
        "child_kl": models["child"]["kl"],
        "uniform_kl": models["uniform"]["kl"],
        "speedup_when_width_was_chosen": {name: found["models"][name]["measured_speedup"] for name in ("child", "uniform")},
    }
    for stage, taken in run.seconds.items():
        print(f"{stage:<14}{taken:8.1f} s")
    for name, figures in models.items():
        print(f"{name:<8} loss {figures['heldout_loss']:.4f}  KL {figures['kl']:.4f}  {figures['measured_speedup']:.3f} x")
    write(arguments.out, rows, summary)


if __name__ == "__main__":
    main()
