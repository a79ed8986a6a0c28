"""Finds the best architecture within the limits: one variant per layer, by mixed-integer programming."""

from __future__ import annotations

from jobs.cli import run_main, stage_command
from jobs.stages import Run
from puzzle_ray.artifacts import Architecture


def describe(architecture: Architecture) -> str:
    """One line per layer, then cost and proof."""
    lines = [f"  layer {i:3d}  {c.attention:<10} {c.ffn}" for i, c in enumerate(architecture.choices)]
    predicted, parent = architecture.predicted, architecture.parent_predicted
    lines += [
        f"  predicted: {architecture.predicted_speedup:.3f} x faster ({predicted.runtime_ms:.1f} ms for the parent's "
        f"{parent.runtime_ms:.1f}), {predicted.memory_mib:.2f} MiB for {parent.memory_mib:.2f}, "
        f"{predicted.num_params / 1e6:.3f}M parameters for {parent.num_params / 1e6:.3f}M"
        + (" (ESTIMATED, not measured)" if architecture.estimated else ""),
        f"  sum of {architecture.metric} {architecture.objective:.6f}, proven bound {architecture.bound:.6f}, {architecture.status}, "
        f"{1e3 * architecture.solve_s:.0f} ms by {architecture.searcher}",
    ]
    return "\n".join(lines)


def work(run: Run) -> None:
    print(describe(run.architecture))


main = stage_command(work, __doc__ or "")

if __name__ == "__main__":
    run_main(main)
