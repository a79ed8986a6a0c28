"""Rungs of global distillation: where children are compared on their way, so that a hopeless one is not distilled to the end.

A child climbs by one distillation, with one schedule, that pauses at every rung and goes on from its own checkpoint: one that reaches the
top is, bit for bit, the child that is distilled without a pause. Which one goes on is successive halving as in ASHA (arXiv 1810.05934):
whoever comes to a rung is compared with those that were there before. Children of one budget compare by their KL; of different budgets,
as in its multi-objective form (arXiv 2106.12639), by who beats whom: a slow child's lower KL says nothing against a fast one.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from puzzle_ray.distill.gkd import (
    LOOKS,
    GkdJob,
    StoredCheckpoint,
    load_gkd_trainer,
    publish_distilled,
    train_until,
)
from puzzle_ray.distill.gkd_trainer import GkdTrainer
from puzzle_ray.distill.guard import HeldoutGuard, HeldoutRow
from puzzle_ray.distill.settings import REDUCTION, rung_steps
from puzzle_ray.progress import Progress
from puzzle_ray.store import Artifact

ROWS = "rungs"  # a folder of the artifact that children are compared for


@dataclass(frozen=True)
class RungRow:
    """A child at a rung: the held-out KL of its best weights after `step` steps. `goes_on` is None until it is decided.

    At the last rung nothing is decided: who comes there is distilled.
    """

    rung: int
    step: int
    tokens: int
    kl: float
    goes_on: bool | None = None
    is_last: bool = False


@dataclass(frozen=True)
class Climber:
    """A child to be distilled. It is compared with those of the same `scenario`; `asked` is its budget on every swept axis, less being
    stricter. `facts` are reported beside the KL.
    """

    job: GkdJob
    label: str
    asked: tuple[float, ...]
    scenario: tuple[Any, ...]
    facts: Mapping[str, float]

    @property
    def name(self) -> str:
        return self.job.artifact.key

    def beats(self, kl: float, other: Climber, other_kl: float) -> bool:
        """A lower KL, within the same or a stricter budget."""
        mine, theirs = self.asked, other.asked
        return self.scenario == other.scenario and kl < other_kl and all(a <= b for a, b in zip(mine, theirs, strict=True))


def goes_on(child: Climber, kl: float, before: Sequence[tuple[Climber, float]]) -> bool:
    """Whether a child goes on from a rung where the children `before` came first, each with its KL.

    It does where none of them beats it, or where it is among the best `1 / REDUCTION`: by how many beat it, then by KL.
    """
    everyone = [*before, (child, kl)]

    def place(climber: Climber, own: float) -> tuple[int, float]:
        return sum(other.beats(theirs, climber, own) for other, theirs in everyone), own

    mine = place(child, kl)
    ahead = sum(place(*other) <= mine for other in before if other[0].scenario == child.scenario)
    present = 1 + sum(other.scenario == child.scenario for other, _ in before)
    return mine[0] == 0 or ahead < math.ceil(present / REDUCTION)


def climb(
    job: GkdJob, rungs: int | Sequence[int], progress: Progress, *, device: str = "cpu", known: Sequence[RungRow] = (),
    name: str = "distill",
) -> Iterator[RungRow]:  # fmt: skip
    """Distils a child, and yields a row at every rung; at the end of the distillation its artifact is finished.

    `rungs` is their number, or the steps that they are at: the climb ends behind the last of them. `known` are the rows of its first
    rungs from an earlier run: they are yielded as they are. Who stops asking leaves a checkpoint. `name` is shown beside the progress.
    """
    yield from known
    if job.artifact.finished:
        looks, facts = read_looks(job.artifact), job.artifact.facts()
        every = max(1, facts["steps"] // job.config.heldout_looks)  # as it was watched
        steps = rung_steps(facts["steps"], every, rungs) if isinstance(rungs, int) else rungs
        yield from (_row(looks, steps, number, facts["steps"], job) for number in range(len(known), len(steps)))
        return
    trainer = load_gkd_trainer(job, device=device)
    assert trainer.guard is not None, "children are compared by held-out KL"
    steps = rung_steps(trainer.total_steps, trainer.guard.every_steps, rungs) if isinstance(rungs, int) else rungs
    yield from _train(trainer, trainer.guard, job, steps, progress, len(known), name)


def _train(
    trainer: GkdTrainer, guard: HeldoutGuard, job: GkdJob, steps: Sequence[int], progress: Progress, first: int, name: str
) -> Iterator[RungRow]:
    total, kept = trainer.total_steps, StoredCheckpoint(job.artifact)
    kept.load(trainer)
    for number in range(first, len(steps)):
        with progress.stage(f"{name}, rung {number + 1}", total, "steps") as bar:
            bar.advance(trainer.next_step)
            train_until(trainer, steps[number], kept, bar)
        if steps[number] == total:
            guard.restore_best()
            publish_distilled(trainer, job)
        yield _row(guard.rows, steps, number, total, job)


def _row(looks: Sequence[HeldoutRow], steps: Sequence[int], number: int, total: int, job: GkdJob) -> RungRow:
    """By the looks until the child first came there: training that went back from further on looks again at steps below."""
    step = steps[number]
    came = next((n for n, look in enumerate(looks) if look.step == step and not look.returned), len(looks) - 1)
    kl = min(look.kl for look in looks[: came + 1])
    return RungRow(number + 1, step, job.config.tokens_until(step), kl, is_last=step == total)


def read_looks(artifact: Artifact) -> list[HeldoutRow]:
    """What the guard of a finished distillation saw."""
    import pyarrow.parquet as pq

    names = {field.name for field in fields(HeldoutRow)}
    rows = pq.read_table(io.BytesIO(artifact.read(LOOKS))).to_pylist()
    return [HeldoutRow(**{name: value for name, value in row.items() if name in names}) for row in rows]


def read_rows(artifact: Artifact, names: Iterable[str]) -> dict[str, list[RungRow]]:
    """Children's rows as an artifact keeps them; none of who was at no rung."""
    there = set(artifact.names(ROWS))
    known = {name: artifact.read_json(f"{ROWS}/{name}.json") if f"{name}.json" in there else [] for name in names}
    return {name: [from_json(row) for row in rows] for name, rows in known.items()}


def write_rows(artifact: Artifact, name: str, rows: Sequence[RungRow]) -> None:
    artifact.write_json(f"{ROWS}/{name}.json", [to_json(row) for row in rows])


def to_json(row: RungRow) -> dict[str, Any]:
    return asdict(row)


def from_json(raw: Mapping[str, Any]) -> RungRow:
    return RungRow(**raw)
