"""Distil the whole child from the parent (GKD)."""

from __future__ import annotations

from jobs.command import STAGES, stage_verb

VERB = stage_verb("distill-child", __doc__, STAGES, lambda run: print(run.done("gkd").path("child")))

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
