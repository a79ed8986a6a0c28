"""The whole way from a trained parent to a child: library, profile, scores, search, GKD, evaluation, report."""

from __future__ import annotations

from jobs.cli import run_main, stage_command
from jobs.evaluate_child import show
from jobs.stages import Run


def work(run: Run) -> None:
    report = run.report
    show(run)
    print(f"child:  {run.distilled.path('child')}")
    print(f"report: {report.path('index.html')}")
    print(f"serve it: puzzle-ray serve-child --child {run.distilled.path('child')}")


main = stage_command(work, __doc__ or "")

if __name__ == "__main__":
    run_main(main)
