"""How well block distillation uses one device: python -m benchmarks.bld_speed --out FILE.json [--layers N] [--quick]

A random Llama with the shapes of a 1B one (hidden size 2048, FFN 8192, 32 heads on 8 KV heads, 16 layers), one process, no Ray, on the GPU
where there is one. The parent's forward and the training of its variants (half and a quarter of the KV heads, half and a quarter of the
FFN) are timed apart, beside a large matrix product in the same dtype right before them: their share of its rate, and of the maker's
figure where the device is known, is the model FLOPs' utilisation (MFU). FLOPs are those of matrix products and attention as
torch.utils.flop_counter counts them, attention whole, with the half that a causal mask spares. At the end one more micro-batch is profiled.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from benchmarks.record import write
from puzzle_ray.data.order import Tokens
from puzzle_ray.distill.library import SerialLibrary
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.models.child import quiet_transformers, read_config
from puzzle_ray.process import num_cores
from puzzle_ray.profiling.devices import KNOWN_DEVICES
from puzzle_ray.profiling.engines.torch_engine import ENGINE
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

SPACE = (("gqa:4", "gqa:2"), ("ffn:50%", "ffn:25%"))
LENGTH, VOCAB_SIZE, MATRIX = 1024, 8192, 4096
CPU_ATTENTION = {  # what the counter does not know by itself
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop(
        g, q, k, v
    ),
}


def save_random_llama(folder: Path, layers: int) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB_SIZE,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


class Clock:
    """Seconds of work on a device, waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, work: Callable[[], Any]) -> tuple[float, Any]:
        self._wait()
        begun = time.perf_counter()
        found = work()
        self._wait()
        return time.perf_counter() - begun, found

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def matrix_tflops(clock: Clock, dtype: torch.dtype) -> float:
    """10^12 operations a second of a square matrix product, the best of five."""
    a, b = (torch.randn(MATRIX, MATRIX, device=clock.device, dtype=dtype) for _ in range(2))
    seconds = min(clock(lambda: a @ b)[0] for _ in range(5))
    return 2 * MATRIX**3 / seconds / 1e12


def counted(work: Callable[[], Any]) -> tuple[float, Any]:
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        found = work()
    return float(counter.get_total_flops()), found


def measured(stage: SerialLibrary, dtype: torch.dtype, steps: int, warm: int) -> list[dict[str, Any]]:
    """A row for every training micro-batch behind `warm` ones."""
    clock, rows = Clock(stage.stack.device), []
    for position in range(stage.schedule.calibrate + stage.schedule.validate + warm):
        stage.step(position)
    for position in range(stage.group.last + 1, stage.group.last + 1 + steps):
        ids, rate = stage.batch(position), matrix_tflops(clock, dtype)
        row: dict[str, Any] = {"tokens": ids.numel(), "matrix_tflops": rate}
        forward_s, hidden = clock(lambda ids=ids: stage.forward(ids))
        train_s, _ = clock(lambda hidden=hidden, position=position: stage.group.step(position, hidden))
        rows.append(row | {"forward_s": forward_s, "train_s": train_s})
    return rows


def summarised(rows: list[dict[str, Any]], flops: dict[str, float], peak_tflops: float | None) -> dict[str, Any]:
    """Medians over micro-batches."""
    summary: dict[str, Any] = {"matrix_tflops": statistics.median(row["matrix_tflops"] for row in rows)}
    for part, operations in flops.items():
        rates = [operations / row[f"{part}_s"] / 1e12 for row in rows]
        summary |= {
            f"{part}_tokens_per_s": statistics.median(row["tokens"] / row[f"{part}_s"] for row in rows),
            f"{part}_tflop_per_token": operations / rows[0]["tokens"] / 1e12,
            f"{part}_tflops": statistics.median(rates),
            f"{part}_of_matrix_rate": statistics.median(
                rate / row["matrix_tflops"] for rate, row in zip(rates, rows, strict=True)
            ),
            f"{part}_mfu": statistics.median(rates) / peak_tflops if peak_tflops else None,
        }
    summary["tokens_per_s"] = statistics.median(row["tokens"] / (row["forward_s"] + row["train_s"]) for row in rows)
    return summary


def profiled(stage: SerialLibrary, most: int = 12) -> list[dict[str, Any]]:
    """What one more micro-batch spends its time on: operations by their own time."""
    on_gpu = stage.stack.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        stage.step(stage.group.last + 1)
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events)
    return [{"operation": e.key, "share": getattr(e, name) / total, "calls": e.count} for e in events[:most]]


def peak_of(device_name: str, dtype: str) -> float | None:
    """The maker's figure for a device that is known by name."""
    known = next((device for key, device in KNOWN_DEVICES.items() if key in device_name.replace(" ", "")), None)
    return known.tflops[dtype] if known else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="micro-batches that are timed")
    parser.add_argument("--micro-batch-tokens", type=int, default=16_384)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="to compute in; bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--quick", action="store_true", help="one layer, two micro-batches of 2,048 tokens")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = given.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    layers, steps, tokens = (1, 2, 2048) if given.quick else (given.layers, given.steps, given.micro_batch_tokens)
    config = LibraryConfig(
        tokens=(steps + 4) * tokens,
        calibration_tokens=tokens,
        validation_tokens=tokens,
        micro_batch_tokens=tokens,
        parent_dtype=dtype,
        activation_dtype=dtype,
        compute_dtype=dtype,
        checkpoint_every=10**6,
    )
    threads = num_cores()
    text = Tokens(np.random.default_rng(0).integers(0, VOCAB_SIZE, (512, LENGTH), dtype=np.int32))
    with quiet_transformers(), tempfile.TemporaryDirectory() as folder:
        save_random_llama(Path(folder), layers)
        space = search_space(read_config(Path(folder)), *SPACE, 8)
        step = Store(f"{folder}/store").artifact("library", {}, {})
        stage = SerialLibrary(folder, space, config, text, 0, step, threads, device)
        rows = measured(stage, getattr(torch, dtype), steps, warm=1)
        position = stage.group.last + 1
        forward_flops, hidden = counted(lambda: stage.forward(stage.batch(position)))
        train_flops, _ = counted(lambda: stage.group.step(position, hidden))
        operations = profiled(stage)
    name = ENGINE.device_name(device.type == "cuda")
    peak_tflops = peak_of(name, dtype)
    facts = {"device": name, "dtype": dtype, "layers": layers, "space": SPACE, "threads": threads, "peak_tflops": peak_tflops}
    summary = facts | summarised(rows, {"forward": forward_flops, "train": train_flops}, peak_tflops)
    for key, value in summary.items():
        print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
    for found in operations:
        print(f"  {found['share']:6.1%}  {found['calls']:6}  {found['operation']}")
    write(given.out, [*rows, *operations], summary)


if __name__ == "__main__":
    main()
