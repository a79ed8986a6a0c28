"""Trains every block variant to mimic its parent block (BLD)."""

from __future__ import annotations

from jobs.cli import run_main, stage_command
from jobs.stages import Run


def work(run: Run) -> None:
    _ = run.library


main = stage_command(work, "Trains every block variant to mimic its parent block (BLD).")

if __name__ == "__main__":
    run_main(main)
