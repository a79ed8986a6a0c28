"""Train a small Llama on short stories that need no network, once for a store."""

from __future__ import annotations

from jobs.command import STAGES, stage_verb
from jobs.run import Run


def work(run: Run) -> None:
    run.done("tiny_parent")
    print(run.parent.address)


VERB = stage_verb("make-tiny-parent", __doc__, STAGES, work, needs_ray=False, rounds=False)

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
