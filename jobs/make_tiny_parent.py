"""Trains a small Llama on the Python standard library's own text, once per machine."""

from __future__ import annotations

from jobs.cli import run_main, stage_command
from jobs.stages import Run


def work(run: Run) -> None:
    print(run.parent)


main = stage_command(work, "Trains a small Llama on the Python standard library's own text, once per machine.", needs_ray=False)

if __name__ == "__main__":
    run_main(main)
