"""Measure what every block variant costs on the target."""

from __future__ import annotations

from jobs.command import STAGES, stage_verb

VERB = stage_verb("profile-blocks", __doc__, STAGES, lambda run: print(run.done("profile").url), rounds=False)

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
