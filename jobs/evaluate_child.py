"""Compares the parent with its child before and after distillation: held-out predictions, and speed measured side by side."""

from __future__ import annotations

from jobs.cli import run_main, stage_command
from jobs.stages import Run

COLUMNS = (
    ("held-out loss", "heldout_loss", "{:.4f}"),
    ("KL to parent", "kl", "{:.4f}"),
    ("top-1 agree", "top1_agreement", "{:.3f}"),
    ("prefill tok/s", "prefill_tokens_per_s", "{:.0f}"),
    ("decode tok/s", "decode_tokens_per_s", "{:.0f}"),
    ("tok/s", "throughput_tokens_per_s", "{:.0f}"),
    ("MiB", "memory_mib", "{:.1f}"),
    ("params M", "num_params", "{:.3f}"),
)


def show(run: Run) -> None:
    """Prints the comparison as a table, then predicted beside measured, then greedy samples."""
    found = run.evaluation
    print(f"{'':<17}" + "".join(f"{title:>15}" for title, _, _ in COLUMNS))
    for name, values in found["models"].items():
        cells = [fmt.format(values[key] / (1e6 if key == "num_params" else 1)) for _, key, fmt in COLUMNS]
        print(f"{name.replace('_', ' '):<17}" + "".join(f"{cell:>15}" for cell in cells))
    predicted, child = found["predicted"], found["models"]["child"]
    print(f"{'':<17}{'predicted':>15}{'measured':>15}")
    for title, key in (
        ("prefill ms", "prefill_ms"),
        ("decode ms a step", "decode_ms"),
        ("runtime ms", "runtime_ms"),
        ("MiB", "memory_mib"),
    ):
        for who, p, m in (("parent", found["parent_predicted"], found["models"]["parent"]), ("child", predicted, child)):
            print(f"{who + ' ' + title:<24}{p[key]:>8.2f}{m[key]:>15.2f}")
    print(f"{'speed-up':<24}{found['predicted_speedup']:>8.3f}{found['measured_speedup']:>15.3f}")
    for name, text in found["samples"].items():
        print(f"{name.replace('_', ' ')}: {text!r}")


main = stage_command(show, __doc__ or "")

if __name__ == "__main__":
    run_main(main)
