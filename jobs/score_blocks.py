"""Measure the damage of every block variant, one replacement at a time."""

from __future__ import annotations

from jobs.command import STAGES, stage_verb

VERB = stage_verb("score-blocks", __doc__, STAGES, lambda run: print(run.done("scores").url))

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
