"""Make the run's page: frontier, the child layer by layer, tables, curves."""

from __future__ import annotations

from jobs.command import RESULTS, stage_verb
from jobs.run import Run


def work(run: Run) -> None:
    from jobs.stages.report import PAGE

    print(run.done("report").path(PAGE))


VERB = stage_verb("report-run", __doc__, RESULTS, work)

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
