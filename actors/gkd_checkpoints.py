"""What the workers of a global distillation report to Ray Train: figures, and under FSDP their checkpoints."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import train

from puzzle_ray.distill.gkd import Checkpoints
from puzzle_ray.distill.gkd_trainer import GkdTrainer
from puzzle_ray.distill.sharded_checkpoint import load_shards, save_shards


def figures(trainer: GkdTrainer) -> dict[str, Any]:
    """What Ray Train shows of a training: the steps done, the last losses, the last look at held-out text."""
    found: dict[str, Any] = asdict(trainer.curve[-1]) if trainer.curve else {}
    if trainer.guard is not None and trainer.guard.rows:
        found |= {"heldout_kl": trainer.guard.rows[-1].kl, "heldout_loss": trainer.guard.rows[-1].loss}
    return found | {"step": trainer.next_step}


class ReportedCheckpoints:
    """Every worker reports its shard, and Ray Train puts them together in its storage. Another number of workers can take them up."""

    def load(self, trainer: GkdTrainer) -> None:
        reported = train.get_checkpoint()
        if reported is not None:
            with reported.as_directory() as folder:
                load_shards(trainer, Path(folder))

    def save(self, trainer: GkdTrainer) -> None:
        with tempfile.TemporaryDirectory(prefix="puzzle-ray-gkd-") as folder:
            save_shards(trainer, Path(folder))
            train.report(figures(trainer), checkpoint=train.Checkpoint.from_directory(folder))


class ReportedProgress:
    """Checkpoints are kept elsewhere; the figures are reported whenever one is saved."""

    def __init__(self, kept: Checkpoints) -> None:
        self.kept = kept

    def load(self, trainer: GkdTrainer) -> None:
        self.kept.load(trainer)

    def save(self, trainer: GkdTrainer) -> None:
        self.kept.save(trainer)
        train.report(figures(trainer))
