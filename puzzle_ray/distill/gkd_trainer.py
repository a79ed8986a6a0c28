"""The training of a whole child: one optimizer step after the other, and what a checkpoint of it holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from puzzle_ray.data.order import Tokens
from puzzle_ray.data.packing import positions_in_documents
from puzzle_ray.distill.averaging import RunningAverage
from puzzle_ray.distill.child_loss import ChildLoss, States, Terms
from puzzle_ray.distill.chosen_tokens import Markers
from puzzle_ray.distill.curriculum import Curriculum
from puzzle_ray.distill.gradients import AllReduce, FlatGradients, Gradients, ShardedGradients
from puzzle_ray.distill.guard import HeldoutGuard
from puzzle_ray.distill.published import as_published
from puzzle_ray.distill.range_test import WARMUP as TRIAL_WARMUP
from puzzle_ray.distill.range_test import Trial, best_rate, range_test, trial_steps
from puzzle_ray.distill.schedule import LearningRate
from puzzle_ray.distill.settings import AUTO, GkdConfig
from puzzle_ray.errors import PuzzleError, StoreError
from puzzle_ray.models.head import final_states
from puzzle_ray.process import LITTLE, give_back_freed_memory
from puzzle_ray.progress import Bar

if TYPE_CHECKING:
    from puzzle_ray.distill.sharding import Shards

CHECKPOINT = "checkpoint.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_AVERAGE = "average."
_BEST = "guard.best."
_GUARD = "guard."  # before the names of the guard's tensors in a checkpoint
_TRIALS = "trials"  # of the range test, in a checkpoint


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


class GkdTrainer:
    """Trains `child` (float32 weights) towards `parent`, one optimizer step at a time.

    A step takes `gradient_accumulation` micro-batches per worker. This process computes those of `ranks`. By default these are all
    ranks, so that one process does the work of all workers. With fewer, `all_reduce` must sum a tensor over all processes, in place.
    Where both models come from `shards`, every process holds its shard of weights, gradients and optimizer, and all processes must
    call the same methods. `published` is the dtype that the child will be written in. Raises ConfigError where a micro-batch is shorter
    than one sequence.
    """

    def __init__(
        self, child: Any, parent: Any, tokens: Tokens, config: GkdConfig, *, seed: int, ranks: Sequence[int] | None = None,
        all_reduce: AllReduce | None = None, markers: Markers | None = None, shards: Shards | None = None,
        published: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.child, self.parent, self.published = child.eval(), parent.eval().requires_grad_(False), published
        self.config, self.text, self.separator = config, Curriculum.of(tokens, config, seed), tokens.separator
        self.loss = ChildLoss(config, child.config, markers)
        self.ranks = range(config.num_workers) if ranks is None else ranks
        self.all_reduce, self.shards = all_reduce, shards
        self.total_steps = self.text.total_steps
        self.learning_rate = self._schedule(0.0 if config.learning_rate == AUTO else config.learning_rate, self.total_steps)
        self.curve: list[GkdRow] = []
        self.trials: list[Trial] = []
        self.guard: HeldoutGuard | None = None
        self.parameters: dict[str, nn.Parameter] = dict(child.named_parameters())
        self.device = shards.device if shards else next(child.parameters()).device
        self.gradients: Gradients
        count = self.text.micro_batches
        if shards is not None:
            assert all_reduce is not None, "shards are of several processes"
            self.gradients = ShardedGradients(self.parameters, count, self.device, all_reduce, shards.processes)
        else:
            self.gradients = FlatGradients(self.parameters, count, self.device, all_reduce)
        self.optimizer = self._new_optimizer()
        self.average = RunningAverage(self.parameters) if config.average_weights else None

    def _schedule(self, peak: float, steps: int) -> LearningRate:
        return LearningRate.of_gkd(peak, steps, self.config.warmup_fraction, falls=not self.config.average_weights)

    def _new_optimizer(self) -> torch.optim.AdamW:
        matrices = [p for p in self.parameters.values() if p.ndim >= 2]
        others = [p for p in self.parameters.values() if p.ndim < 2]
        decay = self.config.weight_decay
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate.peak, betas=(0.9, 0.95), fused=True)
        for parameter in self.parameters.values():
            state = {name: torch.zeros_like(parameter) for name in _MOMENTS}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **state}
        return optimizer

    def _forget(self) -> None:
        """Optimizer and average begin anew with the child's weights. In place: moments are twice as large as the child."""
        for slots in self.optimizer.state.values():
            for value in slots.values():
                value.zero_()
        if self.average is not None:
            self.average.restart()

    @property
    def next_step(self) -> int:
        """The number of the next step; steps count from 0, so it is also the number of steps done."""
        return len(self.curve)

    def step(self) -> GkdRow:
        """Takes one optimizer step. Raises Diverged where loss or gradient is not finite, before any weight is changed."""
        number, config = self.next_step, self.config
        self.gradients.start()
        for round_, rank, counts in self._passes():
            give_back_freed_memory(LITTLE)  # of the pass before, and of a look at held-out text
            losses = self.loss_terms(self.text.batch(number, rank, round_).to(self.device))
            give_back_freed_memory(LITTLE)  # of logits, which stay away until the next pass
            (losses[0] if counts else 0.0 * losses[0]).backward()
            if counts:
                self.gradients.add(torch.stack([term.detach() for term in losses]))
        norm, (loss, kl, cosine, lm) = self.gradients.finish()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(number, loss, norm)
        if norm > config.gradient_clip:
            self.gradients.scale(config.gradient_clip / norm)
        rate = self.learning_rate.at(number) * (self.guard.rate_factor if self.guard else 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.average is not None:
            self.average.add(number + 1)
        self.curve.append(GkdRow(number, loss, kl, cosine, lm, norm, rate))
        return self.curve[-1]

    def _passes(self) -> Iterator[tuple[int, int, bool]]:
        """(round, rank, whether it counts) of every micro-batch of a step here.

        Processes that share weights take as many passes each: where ranks do not come out even, some take one that does not count.
        """
        rounds = range(self.config.gradient_accumulation)
        yield from ((round_, rank, True) for round_, rank in itertools.product(rounds, self.ranks))
        if self.shards is not None:
            missing = -(-self.config.num_workers // self.shards.processes) - len(self.ranks)
            yield from ((round_, self.ranks[0], False) for round_ in rounds for _ in range(missing))

    def watch(self, batches: Sequence[Tensor]) -> None:
        """From now on training is watched on held-out ids `[sequences, tokens]`."""
        every = max(1, self.total_steps // self.config.heldout_looks)
        here = [ids.to(self.device) for ids in batches]
        kept = self.average.weights if self.average else None
        models, how = (self.child, self.parent, self.parameters, here, every), (self._as_rank_0, self._heldout_states, kept)
        self.guard = HeldoutGuard(*models, *how)

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
        self._forget()

    def end(self) -> None:
        """The child gets the weights that are to be published."""
        if self.guard is not None:
            self.guard.restore_best()
        elif self.average is not None:
            self.average.put()

    def loss_terms(self, input_ids: Tensor) -> Terms:
        """See `ChildLoss.terms`."""
        return self.loss.terms(self.child, self.parent, input_ids, self._states)

    def _states(self, model: Any, input_ids: Tensor) -> Tensor:
        """The output of a model's final norm. Where the text has a separator, it reads each document by itself."""
        run = self.shards.states if self.shards else final_states
        return run(model, input_ids, positions_in_documents(input_ids, self.separator))

    @contextmanager
    def _heldout_states(self) -> Iterator[States]:
        """How models are run that are not trained meanwhile. The child is as it would be published: it has the average of its weights,
        where there is one, in its own dtype."""
        average = self.average.in_place() if self.average else nullcontext()
        with average, as_published(self.parameters, self.published):
            yield self._states
            if self.shards is not None:
                self.shards.release(self.child)  # the parent's may stay gathered, for they never change

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
            self.learning_rate = LearningRate.of_gkd(rate, steps, TRIAL_WARMUP, falls=self.average is None)
            try:
                for _ in range(steps):
                    row = self.step()
                    bar.advance(0, loss=row.loss, kl=row.kl, cosine=row.cosine)
                kl = guard.measure()[0]
            except Diverged:
                kl = math.inf
            guard.restore_best()
            self.curve = []
            self._forget()
            return Trial(rate, kl if math.isfinite(kl) else math.inf, steps)

        self._take_trials(range_test(try_rate, guard.rows[0].kl))

    def _take_trials(self, trials: list[Trial]) -> None:
        self.trials = trials
        if trials:
            self.learning_rate = self._schedule(best_rate(trials), self.total_steps)

    def weight_tensors(self) -> dict[str, Tensor]:
        """What is as large as the child: weights, their average, AdamW's moments, the guard's best weights. They are the live tensors."""
        state = {f"child.{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for moment in _MOMENTS:
                state[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        state |= {f"{_AVERAGE}{name}": value for name, value in self.average.weights.items()} if self.average else {}
        return state | ({f"{_BEST}{name}": value for name, value in self.guard.best.items()} if self.guard else {})

    def small_tensors(self) -> dict[str, Tensor]:
        """What else training carries from step to step: the loss curve, trials, looks at held-out text."""
        curve = torch.tensor([astuple(row) for row in self.curve], dtype=torch.float64)
        state = {
            "adam_steps": next(iter(self.optimizer.state.values()))["step"].cpu().reshape(1).float(),
            "curve": curve.view(-1, len(fields(GkdRow))),
        }
        if self.trials:
            state[_TRIALS] = torch.tensor([astuple(trial) for trial in self.trials], dtype=torch.float64)
        return state | ({f"{_GUARD}{name}": value for name, value in self.guard.small_tensors().items()} if self.guard else {})

    def state_tensors(self) -> dict[str, Tensor]:
        """All that training carries from step to step. On the CPU these are the live tensors, not copies."""
        return {name: value.cpu() for name, value in self.weight_tensors().items()} | self.small_tensors()

    def load_small_tensors(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `small_tensors`. The guard then has room for its best weights."""
        for slots in self.optimizer.state.values():
            slots["step"].fill_(float(state["adam_steps"]))
        self.curve = [GkdRow(int(row[0]), *row[1:]) for row in state["curve"].tolist()]
        if _TRIALS in state:
            self._take_trials([Trial(rate, kl, int(steps)) for rate, kl, steps in state[_TRIALS].tolist()])
        if self.guard is not None:
            self.guard.load_small_tensors({n.removeprefix(_GUARD): v for n, v in state.items() if n.startswith(_GUARD)})

    @torch.no_grad()
    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`. Raises StoreError where names or shapes belong to another model."""
        expected, given = (
            {n: v.shape for n, v in tensors.items() if n not in ("curve", _TRIALS) and not n.startswith(_GUARD)}
            for tensors in (self.state_tensors(), state)
        )
        if expected != given:
            name = min(name for name, _ in expected.items() ^ given.items())
            problem = f"{name} is {given.get(name)}, this child has {expected.get(name)}"
            raise StoreError(CHECKPOINT, problem, "remove the checkpoint")
        self.load_small_tensors(state)
        for name, value in self.weight_tensors().items():
            value.copy_(state[name])

    def check_together(self, where: str) -> None:
        """Raises StoreError where processes are at different steps."""
        if self.all_reduce is not None:
            done = torch.tensor([float(self.next_step * len(self.ranks))], device=self.device)
            self.all_reduce(done)
            if float(done) != self.next_step * self.config.num_workers:
                raise StoreError("store", f"{where} is not the same on every node", "use a shared folder or an fsspec URL")
