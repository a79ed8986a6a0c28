"""Measures the damage of every block variant, one exchange at a time."""

from __future__ import annotations

from jobs.cli import run_main, stage_command
from jobs.stages import Run


def work(run: Run) -> None:
    _ = run.scores_step


main = stage_command(work, "Measures the damage of every block variant, one exchange at a time.")

if __name__ == "__main__":
    run_main(main)
