"""Global knowledge distillation (GKD): the whole child learns from the whole parent (paper v5: L_GKD = L_cosine + L_KLD).

A run is a function of (child, parent, tokens, config, seed). Data are a function of (seed, step, rank), and dropout is off. A
checkpoint holds everything that training carries from step to step. A resumed run therefore ends in the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from puzzle_ray.data.order import epochs, told_if_read_again
from puzzle_ray.data.splits import load_tokens
from puzzle_ray.distill.child_loss import computes_in_half
from puzzle_ray.distill.chosen_tokens import read_markers
from puzzle_ray.distill.curriculum import Curriculum
from puzzle_ray.distill.gkd_trainer import CHECKPOINT, Diverged, GkdRow, GkdTrainer
from puzzle_ray.distill.gradients import AllReduce
from puzzle_ray.distill.guard import HeldoutRow
from puzzle_ray.distill.range_test import trial_facts
from puzzle_ray.distill.recomputing import recompute_layers
from puzzle_ray.distill.settings import AUTO, GkdConfig
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import load_model, model_without_weights, quiet_transformers, read_config, save_child
from puzzle_ray.models.child_files import write_model
from puzzle_ray.progress import Bar, Progress
from puzzle_ray.rows import rows_to_parquet
from puzzle_ray.store import Artifact

CHILD = "child"  # a folder of the artifact
CURVE = "losses.parquet"
LOOKS = "heldout.parquet"  # what the guard saw
TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GkdJob:
    """What a distillation reads and writes. Artifact `child` holds the folder `child`; `data` holds tokens (see `puzzle_ray.data.splits`).

    `heldout` are ids `[sequences, tokens]` that training is watched on (see `puzzle_ray.distill.guard`); without any it is not watched.
    `separator` is the token that documents begin with, where attention does not cross them (see `puzzle_ray.data.packing`).
    `trusted`: the tokenizer's own code may run.
    """

    parent: str
    child: Artifact
    data: Artifact
    artifact: Artifact
    config: GkdConfig
    seed: int
    revision: str | None = None
    heldout: tuple[TokenIds, ...] = ()
    separator: int | None = None
    trusted: bool = False


def steps_saved(artifact: Artifact) -> int:
    """Steps that the artifact's checkpoint holds, by its header alone; 0 where there is none."""
    try:
        with artifact.store.filesystem.open(artifact.path(CHECKPOINT), "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except FileNotFoundError:
        return 0
    return int(header["curve"]["shape"][0])


class Checkpoints(Protocol):
    """Where a training is kept."""

    def load(self, trainer: GkdTrainer) -> None:
        """Continues from the last checkpoint, if there is one."""

    def save(self, trainer: GkdTrainer) -> None: ...


@dataclass(frozen=True)
class StoredCheckpoint:
    """One file of the artifact, with all that training carries. With `writes=False` it is only read."""

    artifact: Artifact
    writes: bool = True

    def load(self, trainer: GkdTrainer) -> None:
        if self.artifact.exists(CHECKPOINT):
            trainer.load_state_tensors(self.artifact.read_tensors(CHECKPOINT)[0])

    def save(self, trainer: GkdTrainer) -> None:
        if self.writes:
            self.artifact.write_tensors(CHECKPOINT, trainer.state_tensors())


def train_to_end(
    trainer: GkdTrainer, artifact: Artifact, progress: Progress, *, writes: bool = True, checkpoints: Checkpoints | None = None
) -> None:
    """Trains to the last step, from the last checkpoint where there is one.

    Without `checkpoints` it is the artifact's, and `writes=False` saves none. Raises StoreError where processes find different ones.
    """
    kept = checkpoints or StoredCheckpoint(artifact, writes)
    kept.load(trainer)
    trainer.check_together(artifact.url)
    with progress.stage("distill", trainer.total_steps, "steps") as bar:
        bar.advance(trainer.next_step)
        train_until(trainer, trainer.total_steps, kept, bar)
        trainer.end()


def train_until(trainer: GkdTrainer, step: int, kept: Checkpoints, bar: Bar) -> None:
    """Trains until `step` steps are done, or the guard gives up. Before the end, a checkpoint says where that was."""
    guard, total = trainer.guard, trainer.total_steps
    if guard is not None and not guard.rows:
        guard.look(0)
    if trainer.needs_rate:
        trainer.choose_rate(bar)
        kept.save(trainer)
    saved = trainer.next_step
    while trainer.next_step < step and not (guard and guard.gave_up):
        before = trainer.next_step
        row = _watched_step(trainer)
        if row is None:
            bar.advance(trainer.next_step - before)
            continue
        if trainer.next_step % trainer.config.checkpoint_every == 0:
            kept.save(trainer)
            saved = trainer.next_step
        bar.advance(loss=row.loss, kl=row.kl, cosine=row.cosine)
    if step < total and saved != trainer.next_step:
        kept.save(trainer)


def _watched_step(trainer: GkdTrainer) -> GkdRow | None:
    """One step, and a look at held-out text where one is due. None where training went back, or has to end."""
    guard = trainer.guard
    if guard is None:
        return trainer.step()
    number = trainer.next_step
    try:
        row = trainer.step()
    except Diverged:
        guard.diverged(number)
    else:
        done, total = trainer.next_step, trainer.total_steps
        if not guard.is_due(done, total) or guard.look(done, done == total):
            return row
    if not guard.gave_up:
        trainer.go_back()
    return None


def load_gkd_trainer(
    job: GkdJob, *, ranks: Sequence[int] | None = None, all_reduce: AllReduce | None = None, device: str = "cpu",
    sharded: bool = False,
) -> GkdTrainer:  # fmt: skip
    """Reads both models and the tokens.

    The parent is in `gkd.parent_dtype`, by default in float32 on the CPU, and in its own dtype on another device. The child's weights
    are float32, and on another device it computes in bfloat16 where the parent is in half precision. With `sharded`, this process and
    the others of the default group hold a part of both models each.
    """
    config, source, folder = job.config, job.child.local_folder(CHILD), locate(job.parent, job.revision)
    parent_dtype, shards = (torch.float32 if device == "cpu" else None), None
    if config.parent_dtype != AUTO:
        parent_dtype = getattr(torch, config.parent_dtype)
    with quiet_transformers():
        if sharded:
            from puzzle_ray.distill.sharding import Shards

            shards = Shards(torch.device(device), offload=config.cpu_offload)
            parent = shards.load(folder, parent_dtype)
            half = torch.bfloat16 if computes_in_half(config, shards.device, parent.dtype) else None
            child = shards.load(source, torch.float32, half)
        else:
            child = load_model(source, torch.float32).to(device)
            parent = load_model(folder, parent_dtype).to(device)
    if config.activation_checkpointing:
        recompute_layers(child)
    tokens, _ = load_tokens(job.data, job.separator)
    markers = read_markers(config.lm_tokens, source, job.trusted)
    trainer = GkdTrainer(
        child, parent, tokens, config, seed=job.seed, ranks=ranks, all_reduce=all_reduce, markers=markers, shards=shards,
        published=read_config(source).dtype or torch.float32,
    )  # fmt: skip
    if job.heldout and trainer.total_steps:
        trainer.watch([torch.from_numpy(ids.copy()) for ids in job.heldout])
    return trainer


def say_epochs(job: GkdJob) -> None:
    """Says so where the text is read more than once, when a training begins: one that goes on, as the winner of a race, has said it."""
    if steps_saved(job.artifact):
        return
    train, _ = load_tokens(job.data)
    asked = Curriculum.of(train, job.config, job.seed).tokens
    told_if_read_again("gkd", epochs(asked, train.num_tokens), train.num_tokens)


def publish_distilled(trainer: GkdTrainer, job: GkdJob, *, writes: bool = True) -> None:
    """Writes the distilled child in its own dtype, its tokenizer and the loss curve, and finishes the artifact.

    Of a sharded child, weights are gathered and written one after the other. Then all processes must call this, and one `writes`.
    """
    gathered = trainer.shards.whole_tensors(trainer.parameters) if trainer.shards else None
    if not writes:
        for _ in gathered or ():
            pass
        return
    kept = trainer.guard.best_row.step if trainer.guard else trainer.total_steps  # of the weights that are published
    config, source, made = job.config, job.child.local_folder(CHILD), {"distilled": "globally, from its parent", "steps": kept}
    dtype = trainer.published
    with quiet_transformers(), job.artifact.folder_to_publish(CHILD) as folder:
        if gathered is not None:
            write_model(model_without_weights(source, dtype), gathered, dtype, source, folder, made)
        else:
            save_child(trainer.child.to(dtype), source, folder, made)
    job.artifact.write(CURVE, rows_to_parquet(trainer.curve, GkdRow, {}))
    last = {f"last_{name}": getattr(row, name) for row in trainer.curve[-1:] for name in ("loss", "kl", "cosine", "lm")}
    facts: dict[str, Any] = {"steps": trainer.total_steps, "tokens": trainer.text.tokens, **last}
    if trainer.next_step < trainer.total_steps:
        facts["ended_after"] = trainer.next_step
    if config.lm_weight and config.lm_tokens is not None and trainer.curve and not any(row.lm for row in trainer.curve):
        facts["lm_tokens_found"] = False
    if trainer.trials:
        facts |= {"learning_rate": trainer.learning_rate.peak, "range_test": trial_facts(trainer.trials)}
    if trainer.guard is not None:
        job.artifact.write(LOOKS, rows_to_parquet(trainer.guard.rows, HeldoutRow, {}))
        facts |= trainer.guard.facts()
    job.artifact.finish(facts, drop=[CHECKPOINT])


def distill_child(job: GkdJob, progress: Progress) -> None:
    """The whole stage in this process, whatever `gkd.num_workers` is. Does nothing where the artifact is finished."""
    if not job.artifact.finished:
        say_epochs(job)
        trainer = load_gkd_trainer(job, device="cuda" if job.config.use_gpu else "cpu")
        train_to_end(trainer, job.artifact, progress)
        publish_distilled(trainer, job)
