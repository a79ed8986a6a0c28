"""Train every block variant to mimic its parent block (BLD)."""

from __future__ import annotations

from jobs.command import STAGES, stage_verb

VERB = stage_verb("build-library", __doc__, STAGES, lambda run: print(run.done("library").url))

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
