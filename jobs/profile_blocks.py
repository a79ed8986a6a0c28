"""Measures what every block variant costs on the target."""

from __future__ import annotations

from jobs.cli import run_main, stage_command
from jobs.stages import Run


def work(run: Run) -> None:
    _ = run.profile  # says so where it is an estimate


main = stage_command(work, "Measures what every block variant costs on the target.")

if __name__ == "__main__":
    run_main(main)
