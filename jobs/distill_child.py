"""Distils the whole child from the parent (GKD)."""

from __future__ import annotations

from jobs.cli import run_main, stage_command
from jobs.stages import Run


def work(run: Run) -> None:
    print(run.distilled.path("child"))


main = stage_command(work, "Distils the whole child from the parent (GKD).")

if __name__ == "__main__":
    run_main(main)
