"""The whole way from a trained parent to a child: library, profile, scores, search, GKD, evaluation, report."""

from __future__ import annotations

from jobs.command import SEARCHES, stage_verb
from jobs.evaluate_child import show
from jobs.run import Run


def work(run: Run) -> None:
    from jobs.stages.report import PAGE

    report = run.done("report")
    child = run.content("gkd").path("child")
    show(run)
    print(f"child:  {child}")
    print(f"report: {report.path(PAGE)}")
    print(f"serve it: puzzle-ray serve-child --child {child}")


VERB = stage_verb("compress", __doc__, SEARCHES, work)

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
