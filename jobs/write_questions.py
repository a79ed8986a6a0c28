"""Write the multiple-choice questions of lm-evaluation-harness' tasks as a file for scoring.downstream, each with its task."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.command import RESULTS, Debug, Verb

Task = Annotated[list[str], typer.Option(help="A task of lm_eval, such as mmlu, or a .jsonl file; may be repeated.")]
Out = Annotated[str, typer.Option(help="The .jsonl file to write.")]


def write(task: Task, out: Out, debug: Debug = False) -> None:
    """Write the multiple-choice questions of lm-evaluation-harness' tasks as a file for scoring.downstream, each with its task."""
    from puzzle_ray.evaluation.task_names import harness_version

    harness_version()
    from puzzle_ray.evaluation.harness import write_questions

    print(f"{write_questions(task, out)} questions: {out}")


VERB = Verb("write-questions", RESULTS, write)

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
