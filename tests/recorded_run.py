"""A run of our own command line or of `compress`, in a process of its own, that notes whatever it adds to the store.

`python recorded_run.py LOG compress SETTINGS` (JSON) or `python recorded_run.py LOG VERB OPTION...`; a line of LOG is
`<process> <artifact>/<file>`.
"""

import json
import os
import sys
from contextlib import contextmanager

from puzzle_ray.store import Artifact


def note(log: str) -> None:
    """Every file that an artifact is given from now on is a line in `log`, by whichever process it is given."""
    put, publish = Artifact._put, Artifact.folder_to_publish

    def tell(artifact: Artifact, name: str) -> None:
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {artifact.name}/{name}\n")

    def noted_put(self, name, *how):
        put(self, name, *how)
        tell(self, name)

    @contextmanager
    def noted_publish(self, name):
        with publish(self, name) as folder:
            yield folder
        tell(self, name)

    Artifact._put, Artifact.folder_to_publish = noted_put, noted_publish


def main(log: str, verb: str, *words: str) -> int:
    note(log)
    if verb != "compress":
        from jobs import app

        return app.run([verb, *words])
    from puzzle_ray.errors import PuzzleError
    from puzzle_ray.pipeline import compress
    from puzzle_ray.progress import Quiet

    try:
        found = compress(settings=json.loads(words[0]), progress=Quiet())
    except PuzzleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"child": found.child, "choices": [choice.label for choice in found.architecture.choices]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
