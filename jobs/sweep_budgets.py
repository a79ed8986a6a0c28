"""Search a grid of budgets with Ray Tune and show the frontier."""

from __future__ import annotations

from jobs.command import SEARCHES, stage_verb
from jobs.run import Run
from jobs.search_architecture import unsolved
from puzzle_ray.search.sweep import SweepPoint


def line(point: SweepPoint, width: int) -> str:
    """One budget and its answer."""
    found = point.architecture
    if found is None:
        return f"{point.label:>{width}} {point.why_none}"
    measured = f"{point.measured_kl:>9.5f}" if point.measured_kl is not None else f"{'':>9}"
    measured += f" {point.distilled['kl']:>9.5f}" if point.distilled else f" {'':>9}"
    return (
        f"{point.label:>{width}} {found.predicted_speedup:>9.3f}x {found.objective:>10.5f} {measured} "
        f"{found.predicted.memory_mib:>9.2f} {found.predicted.num_params / 1e6:>8.3f}M  {found.status}"
        + ("" if point.on_frontier else " (off the frontier)")
        + (" (ESTIMATED)" if found.estimated else "")
        + (f" (ended after {point.rungs[-1]['tokens']:,} tokens of GKD, KL {point.rungs[-1]['kl']:.5f})" if point.stopped else "")
        + unsolved(found)
    )


def work(run: Run) -> None:
    from jobs.stages import sweep

    artifact = run.done("sweep")
    points = sweep.read(run)
    width = max(7, *(len(point.label) for point in points))
    print(f"{'asked':>{width}} {'predicted':>10} {'score':>10} {'true KL':>9} {'after GKD':>9} {'MiB':>9} {'params':>9}  status")
    for point in points:
        print(line(point, width))
    print(f"tables: {artifact.path('sweep.csv')} and sweep.parquet")


VERB = stage_verb("sweep-budgets", __doc__, SEARCHES, work, rounds=False)

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
