"""A race of children: the finalists of a pick begin their global distillation, and the one that is ahead goes on.

All of them are distilled with the schedule and the seed that the winner will be distilled with to its end, each under the key of that
distillation. At every rung they wait for each other and are compared by held-out KL (see `puzzle_ray.distill.rungs`). Whoever is not
among the best third there stops; behind the last rung only the best one is left. The winner's checkpoint lies where its distillation
goes on: it costs nothing besides, and ends in the bits of a child that never waited.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

from puzzle_ray.distill.gkd import GkdJob, say_epochs
from puzzle_ray.distill.rungs import RungRow, climb, read_rows, write_rows
from puzzle_ray.distill.settings import REDUCTION
from puzzle_ray.progress import Progress
from puzzle_ray.store import Artifact, adding_items

Rows = Mapping[str, Sequence[RungRow]]  # of every child that races, by its name
Advance = Callable[[Sequence[str], int], None]  # brings children to a rung, counted from 0


def race(names: Sequence[str], num_rungs: int, rows: Rows, advance: Advance) -> dict[str, list[RungRow]]:
    """Everyone's rows, with who went on from where.

    `rows` are those that are there; `advance` adds one for each of the children that it is given. Of equal KLs the first name counts.
    """
    going, decided = list(names), {name: list[RungRow]() for name in names}
    for number in range(num_rungs):
        if len(going) == 1:
            break
        missing = [name for name in going if len(rows[name]) <= number]
        if missing:
            advance(missing, number)
        places = sorted(going, key=lambda name: rows[name][number].kl)
        ahead = places[: still_racing(len(going), number, num_rungs)]
        for name in going:
            decided[name].append(replace(rows[name][number], goes_on=name in ahead))
        going = [name for name in going if name in ahead]
    return decided


def still_racing(count: int, rung: int, num_rungs: int) -> int:
    """How many of `count` children go on from a rung, counted from 0."""
    return 1 if rung == num_rungs - 1 else math.ceil(count / REDUCTION)


def at_rungs(count: int, num_rungs: int) -> list[int]:
    """How many of `count` children come to every rung; one that is alone comes to none."""
    found: list[int] = []
    for rung in range(num_rungs):
        if count > 1:
            found.append(count)
            count = still_racing(count, rung, num_rungs)
    return found


def losers_steps(count: int, steps: Sequence[int]) -> int:
    """Steps that the losers of a race of `count` children take in all, with rungs after so many steps; or tokens, by rungs' tokens."""
    there = [*at_rungs(count, len(steps)), 1]
    return sum((here - ahead) * step for here, ahead, step in zip(there, there[1:], steps, strict=False))


def race_here(
    jobs: Sequence[GkdJob], steps: Sequence[int], artifact: Artifact, progress: Progress
) -> dict[str, list[RungRow]]:  # fmt: skip
    """A race in this process, one child after the other. Rows are kept in `artifact`: a run again takes no step twice."""
    by_name = {job.artifact.key: job for job in jobs}
    rows = read_rows(artifact, by_name)
    say_epochs(jobs[0])

    def advance(names: Sequence[str], number: int) -> None:
        for place, name in enumerate(names, 1):
            job, words = by_name[name], f"race, child {place} of {len(names)}"
            how = {"device": "cuda" if job.config.use_gpu else "cpu", "name": words}
            with nullcontext() if job.artifact.finished else adding_items(job.artifact):
                rows[name] = list(climb(job, steps[: number + 1], progress, known=rows[name][:number], **how))
            write_rows(artifact, name, rows[name])

    return race(list(by_name), len(steps), rows, advance)
