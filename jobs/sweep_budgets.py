"""Searches a list of budgets with Ray Tune and shows the frontier."""

from __future__ import annotations

from jobs.cli import run_main, stage_command
from jobs.stages import Run
from puzzle_ray.sweep import read


def work(run: Run) -> None:
    print(f"{'asked':>7} {'predicted':>10} {'score':>10} {'MiB':>9} {'params':>9}  status")
    for point in read(run.sweep):
        found = point.architecture
        if found is None:
            print(f"{point.speedup_asked:>6.2f}x {point.infeasible_reason}")
            continue
        frontier = "" if point.on_frontier else " (off the frontier)"
        print(
            f"{point.speedup_asked:>6.2f}x {found.predicted_speedup:>9.3f}x {found.objective:>10.5f} {found.predicted.memory_mib:>9.2f} "
            f"{found.predicted.num_params / 1e6:>8.3f}M  {found.status}{frontier}"
        )


main = stage_command(work, __doc__ or "")

if __name__ == "__main__":
    run_main(main)
