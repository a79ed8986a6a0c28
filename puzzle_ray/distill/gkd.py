"""Global knowledge distillation (GKD): the whole child learns from the whole parent (paper v5: L_GKD = L_cosine + L_KLD).

A run is a function of (child, parent, tokens, config, seed). Data are a function of (seed, step, rank), and dropout is off. A
checkpoint holds everything that training carries from step to step. A resumed run therefore ends in the same bits.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from puzzle_ray.artifacts import rows_to_parquet
from puzzle_ray.data.order import Tokens, epochs, told_if_read_again
from puzzle_ray.data.splits import load_tokens
from puzzle_ray.distill.child_loss import ChildLoss, Terms
from puzzle_ray.distill.chosen_tokens import Markers, read_markers
from puzzle_ray.distill.curriculum import Curriculum
from puzzle_ray.distill.guard import HeldoutGuard, HeldoutRow
from puzzle_ray.distill.range_test import WARMUP as TRIAL_WARMUP
from puzzle_ray.distill.range_test import Trial, best_rate, range_test, trial_facts, trial_steps
from puzzle_ray.distill.schedule import LearningRate
from puzzle_ray.distill.settings import AUTO, GkdConfig
from puzzle_ray.errors import PuzzleError, StoreError
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import load_model, quiet_transformers, read_config, save_child
from puzzle_ray.progress import Bar, Progress
from puzzle_ray.store import Artifact

CHILD = "child"  # a folder of the artifact
CHECKPOINT = "checkpoint.safetensors"
CURVE = "losses.parquet"
LOOKS = "heldout.parquet"  # what the guard saw
_MOMENTS = ("exp_avg", "exp_avg_sq")
_GUARD = "guard."  # before the names of the guard's tensors in a checkpoint
_TRIALS = "trials"  # of the range test, in a checkpoint
TokenIds = npt.NDArray[np.int64]


class Diverged(PuzzleError):
    """The loss or the gradient of `step` became NaN or infinite."""

    def __init__(self, step: int, loss: float, gradient_norm: float) -> None:
        super().__init__(step, loss, gradient_norm)

    def __str__(self) -> str:
        step, loss, gradient_norm = self.args
        return f"gkd: loss {loss}, gradient norm {gradient_norm} at step {step}; lower gkd.learning_rate"


@dataclass(frozen=True)
class GkdRow:
    """One step of the loss curve, a mean over all workers. `loss` is the weighted sum of the three terms."""

    step: int
    loss: float
    kl: float
    cosine: float
    lm: float
    gradient_norm: float
    learning_rate: float


@dataclass(frozen=True)
class GkdJob:
    """What a distillation reads and writes. Artifact `child` holds the folder `child`; `data` holds tokens (see `puzzle_ray.data.splits`).

    `heldout` are ids `[sequences, tokens]` that training is watched on (see `puzzle_ray.distill.guard`); without any it is not watched.
    """

    parent: str
    child: Artifact
    data: Artifact
    artifact: Artifact
    config: GkdConfig
    seed: int
    revision: str | None = None
    heldout: tuple[TokenIds, ...] = ()


class GkdTrainer:
    """Trains `child` (float32 weights) towards `parent`, one optimizer step at a time.

    A step takes `gradient_accumulation` micro-batches per worker. This process computes those of `ranks`. By default these are all
    ranks, so that one process does the work of all workers. With fewer, `all_reduce` must sum a tensor over all processes, in place.
    Raises ConfigError where a micro-batch is shorter than one sequence.
    """

    def __init__(
        self, child: Any, parent: Any, tokens: Tokens, config: GkdConfig, *, seed: int,
        ranks: Sequence[int] | None = None, all_reduce: Callable[[Tensor], None] | None = None, markers: Markers | None = None,
    ) -> None:  # fmt: skip
        self.child, self.parent = child.eval(), parent.eval().requires_grad_(False)
        self.config, self.text = config, Curriculum.of(tokens, config, seed)
        self.loss = ChildLoss(config, child.config, markers)
        self.ranks = range(config.num_workers) if ranks is None else ranks
        self.all_reduce = all_reduce
        self.total_steps = self.text.total_steps
        self.learning_rate = self._schedule(0.0 if config.learning_rate == AUTO else config.learning_rate, self.total_steps)
        self.curve: list[GkdRow] = []
        self.trials: list[Trial] = []
        self.guard: HeldoutGuard | None = None
        self.parameters: dict[str, nn.Parameter] = dict(child.named_parameters())
        self.device = next(child.parameters()).device
        # All gradients are views of one buffer. Its last four elements are the losses. So a step needs one all-reduce and one norm.
        self.sums = torch.zeros(sum(p.numel() for p in self.parameters.values()) + 4, device=self.device)
        self.gradients, self.losses = self.sums[:-4], self.sums[-4:]
        start = 0
        for parameter in self.parameters.values():
            parameter.grad = self.gradients[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        self.optimizer = self._new_optimizer()

    def _schedule(self, peak: float, steps: int) -> LearningRate:
        return LearningRate.of_gkd(peak, steps, self.config.warmup_fraction)

    def _new_optimizer(self) -> torch.optim.AdamW:
        matrices = [p for p in self.parameters.values() if p.ndim >= 2]
        others = [p for p in self.parameters.values() if p.ndim < 2]
        decay = self.config.weight_decay
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate.peak, betas=(0.9, 0.95), fused=True)
        for parameter in self.parameters.values():
            state = {name: torch.zeros_like(parameter) for name in _MOMENTS}
            optimizer.state[parameter] = {"step": torch.zeros((), device=self.device), **state}
        return optimizer

    @property
    def next_step(self) -> int:
        """The number of the next step; steps count from 0, so it is also the number of steps done."""
        return len(self.curve)

    def step(self) -> GkdRow:
        """Takes one optimizer step. Raises Diverged where loss or gradient is not finite, before any weight is changed."""
        number, config = self.next_step, self.config
        self.sums.zero_()
        for round_, rank in itertools.product(range(config.gradient_accumulation), self.ranks):
            losses = self.loss_terms(self.text.batch(number, rank, round_).to(self.device))
            losses[0].backward()
            self.losses += torch.stack([term.detach() for term in losses])
        if self.all_reduce is not None:
            self.all_reduce(self.sums)
        self.sums /= config.num_workers * config.gradient_accumulation
        norm = float(torch.linalg.vector_norm(self.gradients))
        loss, kl, cosine, lm = self.losses.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(number, loss, norm)
        if norm > config.gradient_clip:
            self.gradients *= config.gradient_clip / norm
        rate = self.learning_rate.at(number) * (self.guard.rate_factor if self.guard else 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.curve.append(GkdRow(number, loss, kl, cosine, lm, norm, rate))
        return self.curve[-1]

    def watch(self, batches: Sequence[Tensor]) -> None:
        """From now on training is watched on held-out ids `[sequences, tokens]`."""
        every = max(1, self.total_steps // self.config.heldout_looks)
        self.guard = HeldoutGuard(self.child, self.parent, self.parameters, batches, every, self._as_rank_0)

    def _as_rank_0(self, values: Sequence[float]) -> list[float]:
        """What rank 0 measured, for all processes alike: on GPUs they may differ in the last bit, and must decide alike."""
        if self.all_reduce is None:
            return list(values)
        shared = torch.tensor([v if 0 in self.ranks else 0.0 for v in values], dtype=torch.float64, device=self.device)
        self.all_reduce(shared)
        return [float(v) for v in shared]

    def go_back(self) -> None:
        """To the best weights so far, with half the learning rate and an optimizer that starts anew."""
        assert self.guard is not None
        self.curve = self.curve[: self.guard.restore_best()]
        self.guard.rate_factor *= 0.5
        self.optimizer = self._new_optimizer()

    def loss_terms(self, input_ids: Tensor) -> Terms:
        """See `ChildLoss.terms`."""
        return self.loss.terms(self.child, self.parent, input_ids)

    @property
    def needs_rate(self) -> bool:
        """Whether the learning rate is still to be chosen."""
        return self.config.learning_rate == AUTO and not self.trials and self.total_steps > 0

    def choose_rate(self, bar: Bar) -> None:
        """Tries learning rates (see `puzzle_ray.distill.range_test`), and takes the best one. The child is as before afterwards."""
        guard = self.guard
        assert guard is not None and guard.rows, "a range test needs held-out text, and a look at it"

        def try_rate(rate: float) -> Trial:
            steps = trial_steps(self.total_steps)
            self.learning_rate = LearningRate.of_gkd(rate, steps, TRIAL_WARMUP)
            try:
                for _ in range(steps):
                    row = self.step()
                    bar.advance(0, loss=row.loss, kl=row.kl, cosine=row.cosine)
                kl = guard.measure()[0]
            except Diverged:
                kl = math.inf
            guard.restore_best()
            self.curve, self.optimizer = [], self._new_optimizer()
            return Trial(rate, kl if math.isfinite(kl) else math.inf, steps)

        self._take_trials(range_test(try_rate, guard.rows[0].kl))

    def _take_trials(self, trials: list[Trial]) -> None:
        self.trials = trials
        if trials:
            self.learning_rate = self._schedule(best_rate(trials), self.total_steps)

    def state_tensors(self) -> dict[str, Tensor]:
        """What training carries from step to step: weights, AdamW's moments, the loss curve.

        On the CPU these are the live tensors, not copies.
        """
        state = {f"child.{name}": p.detach().cpu() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for moment in _MOMENTS:
                state[f"{moment}.{name}"] = self.optimizer.state[parameter][moment].cpu()
        state["adam_steps"] = next(iter(self.optimizer.state.values()))["step"].cpu().reshape(1).float()
        curve = torch.tensor([astuple(row) for row in self.curve], dtype=torch.float64)
        state["curve"] = curve.view(-1, len(fields(GkdRow)))
        if self.trials:
            state[_TRIALS] = torch.tensor([astuple(trial) for trial in self.trials], dtype=torch.float64)
        if self.guard is not None:
            state |= {f"{_GUARD}{name}": value for name, value in self.guard.state_tensors().items()}
        return state

    @torch.no_grad()
    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`. Raises StoreError where names or shapes belong to another model."""
        expected, given = (
            {
                name: value.shape
                for name, value in tensors.items()
                if name not in ("curve", _TRIALS) and not name.startswith(_GUARD)
            }
            for tensors in (self.state_tensors(), state)
        )
        if expected != given:
            name = min(name for name, _ in expected.items() ^ given.items())
            problem = f"{name} is {given.get(name)}, this child has {expected.get(name)}"
            raise StoreError(CHECKPOINT, problem, "remove the checkpoint")
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"child.{name}"])
            slots = self.optimizer.state[parameter]
            slots["step"].fill_(float(state["adam_steps"]))
            for moment in _MOMENTS:
                slots[moment].copy_(state[f"{moment}.{name}"])
        self.curve = [GkdRow(int(row[0]), *row[1:]) for row in state["curve"].tolist()]
        if _TRIALS in state:
            self._take_trials([Trial(rate, kl, int(steps)) for rate, kl, steps in state[_TRIALS].tolist()])
        if self.guard is not None:
            own = {name.removeprefix(_GUARD): value for name, value in state.items() if name.startswith(_GUARD)}
            self.guard.load_state_tensors(own)

    def resume(self, artifact: Artifact) -> None:
        """Continues from the artifact's checkpoint, if there is one. Raises StoreError where processes find different ones."""
        if artifact.exists(CHECKPOINT):
            self.load_state_tensors(artifact.read_tensors(CHECKPOINT)[0])
        if self.all_reduce is not None:
            done = torch.tensor([float(self.next_step)], device=self.device)
            self.all_reduce(done)
            if float(done) != self.next_step * self.config.num_workers:
                problem = f"{artifact.url} is not the same on every node"
                raise StoreError("store", problem, "use a shared folder or an fsspec URL")


def steps_saved(artifact: Artifact) -> int:
    """Steps that the artifact's checkpoint holds, by its header alone; 0 where there is none."""
    try:
        with artifact.store.filesystem.open(artifact.path(CHECKPOINT), "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except FileNotFoundError:
        return 0
    return int(header["curve"]["shape"][0])


def train_to_end(trainer: GkdTrainer, artifact: Artifact, progress: Progress, *, writes: bool = True) -> None:
    """Trains to the last step, from the artifact's checkpoint where there is one. With `writes=False` it saves no checkpoints."""
    trainer.resume(artifact)
    with progress.stage("distill", trainer.total_steps, "steps") as bar:
        bar.advance(trainer.next_step)
        train_until(trainer, trainer.total_steps, artifact, bar, writes=writes)
        if trainer.guard is not None:
            trainer.guard.restore_best()


def train_until(trainer: GkdTrainer, step: int, artifact: Artifact, bar: Bar, *, writes: bool = True) -> None:
    """Trains until `step` steps are done, or the guard gives up. Before the end, a checkpoint says where that was."""
    guard, total = trainer.guard, trainer.total_steps
    if guard is not None and not guard.rows:
        guard.look(0)
    if trainer.needs_rate:
        trainer.choose_rate(bar)
        if writes:
            artifact.write_tensors(CHECKPOINT, trainer.state_tensors())
    saved = trainer.next_step
    while trainer.next_step < step and not (guard and guard.gave_up):
        before = trainer.next_step
        row = _watched_step(trainer)
        if row is None:
            bar.advance(trainer.next_step - before)
            continue
        if writes and trainer.next_step % trainer.config.checkpoint_every == 0:
            artifact.write_tensors(CHECKPOINT, trainer.state_tensors())
            saved = trainer.next_step
        bar.advance(loss=row.loss, kl=row.kl, cosine=row.cosine)
    if writes and step < total and saved != trainer.next_step:
        artifact.write_tensors(CHECKPOINT, trainer.state_tensors())


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
        if not guard.is_due(trainer.next_step, trainer.total_steps) or guard.look(trainer.next_step):
            return row
    if not guard.gave_up:
        trainer.go_back()
    return None


def load_gkd_trainer(
    job: GkdJob,
    *,
    ranks: Sequence[int] | None = None,
    all_reduce: Callable[[Tensor], None] | None = None,
    device: str = "cpu",
) -> GkdTrainer:
    """Reads both models and the tokens.

    On the CPU everything is float32. On another device the parent keeps its own dtype. The child's weights are float32 there, and
    it computes in bfloat16 where the parent is in half precision.
    """
    with quiet_transformers():
        source = job.child.local_folder(CHILD)
        child = load_model(source, torch.float32).to(device)
        parent = load_model(locate(job.parent, job.revision), torch.float32 if device == "cpu" else None).to(device)
    tokens, _ = load_tokens(job.data)
    markers = read_markers(job.config.lm_tokens, source)
    trainer = GkdTrainer(child, parent, tokens, job.config, seed=job.seed, ranks=ranks, all_reduce=all_reduce, markers=markers)
    if job.heldout and trainer.total_steps:
        trainer.watch([torch.from_numpy(ids.copy()) for ids in job.heldout])
    return trainer


def say_epochs(job: GkdJob) -> None:
    """Says so where the text is read more than once."""
    train, _ = load_tokens(job.data)
    asked = Curriculum.of(train, job.config, job.seed).tokens
    told_if_read_again("gkd", epochs(asked, train.num_tokens), train.num_tokens)


def publish_distilled(trainer: GkdTrainer, job: GkdJob) -> None:
    """Writes the distilled child in its own dtype, its tokenizer and the loss curve, and finishes the artifact."""
    source = job.child.local_folder(CHILD)
    child = trainer.child.to(read_config(source).dtype or torch.float32)
    with quiet_transformers(), job.artifact.folder_to_publish(CHILD) as folder:
        save_child(child, source, folder, {"distilled": "globally, from its parent", "steps": trainer.total_steps})
    job.artifact.write(CURVE, rows_to_parquet(trainer.curve, GkdRow, {}))
    last = {f"last_{name}": getattr(row, name) for row in trainer.curve[-1:] for name in ("loss", "kl", "cosine", "lm")}
    facts: dict[str, Any] = {"steps": trainer.total_steps, "tokens": trainer.text.tokens, **last}
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
