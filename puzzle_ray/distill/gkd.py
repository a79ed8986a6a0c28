"""Global knowledge distillation (GKD): the whole child learns from the whole parent (paper v5: L_GKD = L_cosine + L_KLD).

A run is a function of (child, parent, tokens, config, seed). Data are a function of (seed, step, rank), and dropout is off. A
checkpoint holds everything that training carries from step to step. A resumed run therefore ends in the same bits.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from puzzle_ray.artifacts import rows_to_parquet
from puzzle_ray.data.order import Tokens
from puzzle_ray.data.splits import load_tokens
from puzzle_ray.distill.guard import HeldoutGuard, HeldoutRow
from puzzle_ray.distill.head_losses import head_losses, layers_cosine_distance
from puzzle_ray.distill.schedule import LearningRate
from puzzle_ray.distill.settings import GkdConfig
from puzzle_ray.errors import ConfigError, PuzzleError, StoreError
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import load_model, quiet_transformers, read_config, save_child
from puzzle_ray.models.describe import describe
from puzzle_ray.models.head import Head, final_states
from puzzle_ray.progress import Progress
from puzzle_ray.store import Artifact

CHILD = "child"  # a folder of the artifact
CHECKPOINT = "checkpoint.safetensors"
CURVE = "losses.parquet"
LOOKS = "heldout.parquet"  # what the guard saw
_MOMENTS = ("exp_avg", "exp_avg_sq")
_GUARD = "guard."  # before the names of the guard's tensors in a checkpoint
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


@contextmanager
def layer_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the output of every layer while the context is open: `[batch, tokens, hidden_size]`, before the final norm."""
    outputs: list[Tensor] = []

    def collect(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    layers = model.get_submodule(describe(model.config).layers)
    hooks = [layer.register_forward_hook(collect) for layer in layers.children()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def gkd_steps(config: GkdConfig) -> int:
    """Optimizer steps until `config.tokens` are used, rounded up; 0 for 0 tokens."""
    tokens_per_step = config.micro_batch_tokens * config.num_workers * config.gradient_accumulation
    return math.ceil(config.tokens / tokens_per_step)


class GkdTrainer:
    """Trains `child` (float32 weights) towards `parent`, one optimizer step at a time.

    A step takes `gradient_accumulation` micro-batches per worker. This process computes those of `ranks`. By default these are all
    ranks, so that one process does the work of all workers. With fewer, `all_reduce` must sum a tensor over all processes, in place.
    Raises ConfigError where a micro-batch is shorter than one sequence.
    """

    def __init__(
        self, child: Any, parent: Any, tokens: Tokens, config: GkdConfig, *, seed: int,
        ranks: Sequence[int] | None = None, all_reduce: Callable[[Tensor], None] | None = None,
    ) -> None:  # fmt: skip
        self.child, self.parent = child.eval(), parent.eval().requires_grad_(False)
        self.tokens, self.config, self.seed = tokens, config, seed
        self.ranks = range(config.num_workers) if ranks is None else ranks
        self.all_reduce = all_reduce
        self.total_steps = gkd_steps(config)
        self.learning_rate = LearningRate.of_gkd(config.learning_rate, self.total_steps, config.warmup_fraction)
        self.curve: list[GkdRow] = []
        self.guard: HeldoutGuard | None = None
        length = tokens.sequences.shape[1]
        self.num_sequences = config.micro_batch_tokens // length
        if not self.num_sequences:
            problem = f"{config.micro_batch_tokens} is less than one sequence of {length}"
            raise ConfigError("gkd.micro_batch_tokens", problem)
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

    def _new_optimizer(self) -> torch.optim.AdamW:
        matrices = [p for p in self.parameters.values() if p.ndim >= 2]
        others = [p for p in self.parameters.values() if p.ndim < 2]
        decay = self.config.weight_decay
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.95), fused=True)
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
            place = (number * config.gradient_accumulation + round_) * config.num_workers + rank
            losses = self.loss_terms(self.tokens.batch(self.seed, place, self.num_sequences).to(self.device))
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

    def loss_terms(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(weighted sum, KL, cosine distance, next-token loss) of ids `[batch, tokens]`. A term of weight 0 gives no gradient."""
        config = self.config
        half = self.device.type != "cpu" and self.parent.dtype != torch.float32
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            with torch.no_grad(), layer_outputs(self.parent) as parent_hidden:
                parent_final = final_states(self.parent, input_ids)
            with layer_outputs(self.child) as child_hidden:
                child_final = final_states(self.child, input_ids)
            heads = (Head.of(self.child), child_final, Head.of(self.parent), parent_final)
            total, kl, lm = head_losses(*heads, input_ids, config.kl_weight, config.lm_weight)
        with torch.set_grad_enabled(config.cosine_weight > 0):
            cosine = layers_cosine_distance(child_hidden, parent_hidden)
        return total + config.cosine_weight * cosine, kl, cosine, lm

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
        if self.guard is not None:
            state |= {f"{_GUARD}{name}": value for name, value in self.guard.state_tensors().items()}
        return state

    @torch.no_grad()
    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`. Raises StoreError where names or shapes belong to another model."""
        expected, given = (
            {name: value.shape for name, value in tensors.items() if name != "curve" and not name.startswith(_GUARD)}
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
    guard, total = trainer.guard, trainer.total_steps
    with progress.stage("distill", total, "steps") as bar:
        bar.advance(trainer.next_step)
        if guard is not None and not guard.rows:
            guard.look(0)
        while trainer.next_step < total and not (guard and guard.gave_up):
            before = trainer.next_step
            row = _watched_step(trainer)
            if row is None:
                bar.advance(trainer.next_step - before)
                continue
            if writes and trainer.next_step % trainer.config.checkpoint_every == 0:
                artifact.write_tensors(CHECKPOINT, trainer.state_tensors())
            bar.advance(loss=row.loss, kl=row.kl, cosine=row.cosine)
        if guard is not None:
            guard.restore_best()


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
        child = load_model(job.child.local_folder(CHILD), torch.float32).to(device)
        parent = load_model(locate(job.parent, job.revision), torch.float32 if device == "cpu" else None).to(device)
    tokens, _ = load_tokens(job.data)
    trainer = GkdTrainer(child, parent, tokens, job.config, seed=job.seed, ranks=ranks, all_reduce=all_reduce)
    if job.heldout and trainer.total_steps:
        trainer.watch([torch.from_numpy(ids.copy()) for ids in job.heldout])
    return trainer


def publish_distilled(trainer: GkdTrainer, job: GkdJob) -> None:
    """Writes the distilled child in its own dtype, its tokenizer and the loss curve, and finishes the artifact."""
    source = job.child.local_folder(CHILD)
    child = trainer.child.to(read_config(source).dtype or torch.float32)
    with quiet_transformers(), job.artifact.folder_to_publish(CHILD) as folder:
        save_child(child, source, folder)
    job.artifact.write(CURVE, rows_to_parquet(trainer.curve, GkdRow, {}))
    last = {f"last_{name}": getattr(row, name) for row in trainer.curve[-1:] for name in ("loss", "kl", "cosine", "lm")}
    micro_batches = trainer.total_steps * job.config.num_workers * job.config.gradient_accumulation
    tokens = micro_batches * trainer.num_sequences * trainer.tokens.sequences.shape[1]
    facts = {"steps": trainer.total_steps, "tokens": tokens, **last}
    if trainer.guard is not None:
        job.artifact.write(LOOKS, rows_to_parquet(trainer.guard.rows, HeldoutRow, {}))
        facts |= trainer.guard.facts()
    job.artifact.finish(facts, drop=[CHECKPOINT])


def distill_child(job: GkdJob, progress: Progress) -> None:
    """The whole stage in this process, whatever `gkd.num_workers` is. Does nothing where the artifact is finished."""
    if not job.artifact.finished:
        trainer = load_gkd_trainer(job, device="cuda" if job.config.use_gpu else "cpu")
        train_to_end(trainer, job.artifact, progress)
        publish_distilled(trainer, job)
