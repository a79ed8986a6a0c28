"""Blockwise local distillation (BLD): every variant of a block learns alone to mimic its parent block. (Paper v5, section 3.2.)

A trainer is a state machine over positions 0, 1, 2, ... Each position is one micro-batch. First the trainer gathers calibration
statistics and initialises every variant from them. Then it measures each variant on validation micro-batches, tries learning rates
where none is set, trains it, and measures it again. What it does at a position depends on that position and on the positions before it,
and on nothing else. A trainer that dies therefore continues from its checkpoint to the same bits.

No variant depends on another one. So a layer's variants may be split over several trainers, and each has a checkpoint of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from puzzle_ray.artifacts import KINDS, PARENT, LayerChoice, LayerSpace, SubblockKind
from puzzle_ray.calibration import Statistics
from puzzle_ray.distill.candidate import Candidate
from puzzle_ray.distill.conditioning import ParentNorms, changed_inputs, norms, sensitivity
from puzzle_ray.distill.losses import LayerPass, block_loss, training_loss
from puzzle_ray.distill.rate_trials import RATES, WARMUP, RateTrial
from puzzle_ray.distill.schedule import LearningRate, Phase, Schedule, has_risen, is_flat
from puzzle_ray.distill.settings import AUTO, LibraryConfig
from puzzle_ray.errors import NotFinite, OutOfOrder, ParentError
from puzzle_ray.models.blocks import LayerStack, swapped
from puzzle_ray.process import give_back_freed_memory
from puzzle_ray.variants.base import needed_statistics

__all__ = ["LayerTrainer", "LibraryRow", "Schedule"]

StartingStates = Callable[[int, LayerChoice], Mapping[SubblockKind, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class LibraryRow:
    """One trained variant, or a coupled pair: then `kind` is `block` and `variant` names both variants.

    `start_loss` and `final_loss` are the normalised MSE on validation micro-batches, before and after training. `kept` says which
    weights are in the library: `start` or `trained`. `tokens` is the number of tokens it was trained on. `tokens_saved` is the
    number that an early stop spared, 0 where training ran to the end. `failure` is empty where nothing failed. `returns` counts how
    often training went back to the start, since the loss had risen, and on with half the learning rate.

    Of the weights that are kept: `singular_value` is the largest singular value of the matrix that is furthest above the parent's,
    `parent_singular_value`; `sensitivity` is the rise of the block's loss under a random relative change of 1e-3 of its input, and
    `parent_sensitivity` that of the parent's own block. See `puzzle_ray.distill.conditioning`.
    """

    layer: int
    kind: str
    variant: str
    initialisation: str
    start_loss: float
    final_loss: float
    kept: str
    tokens: int
    failure: str
    tokens_saved: int = 0
    returns: int = 0
    singular_value: float = 0.0
    parent_singular_value: float = 0.0
    sensitivity: float = 0.0
    parent_sensitivity: float = 0.0


class LayerTrainer:
    """Trains everything that a library holds of one layer, or some `choices` of it.

    Call `step` for positions 0, 1, 2, ... in order. `starts(layer, choice)` gives the weights that a choice starts from. Without it
    every variant initialises itself from the parent layer and from calibration statistics.
    """

    def __init__(
        self,
        index: int,
        stack: LayerStack,
        space: LayerSpace,
        config: LibraryConfig,
        starts: StartingStates | None = None,
        choices: Sequence[LayerChoice] | None = None,
    ) -> None:
        self.index, self.stack, self.space, self.config, self.starts = index, stack, space, config, starts
        self.choices = space.trained if choices is None else tuple(choices)
        self.schedule = Schedule.of(config)
        self.learning_rate = self._schedule(0.0 if config.learning_rate == AUTO else config.learning_rate)  # auto: see `_rate`
        self.layer = stack.layer(index).requires_grad_(False)
        self.statistics = Statistics(self._needed() if starts is None else ())
        self.candidates: list[Candidate] = []
        self.position = -1  # the last position that every choice has done
        self.parent = {k: swapped(self.layer, LayerChoice.half(k, PARENT), stack.descriptor, stack.config) for k in KINDS}

    def _schedule(self, peak: float) -> LearningRate:
        return LearningRate.of_bld(peak, self.schedule.steps, self.config.warmup_fraction)

    def _rate(self, candidate: Candidate, step: int) -> float:
        """The learning rate of a step of training."""
        found = candidate.record.rate
        return (self.learning_rate if found is None else self._schedule(found)).at(step)

    def _needed(self) -> frozenset[str]:
        names = {kind: {choice.variant(kind) for choice in self.choices} for kind in KINDS}
        return needed_statistics(names["attention"], "attention") | needed_statistics(names["ffn"], "ffn")

    @property
    def finished(self) -> bool:
        return self.position == self.schedule.positions - 1

    def in_step(self, position: int) -> bool:
        """Whether after this position it is in the middle of an optimizer step. Its checkpoints then have gradients, too."""
        return any(candidate.step_loss is not None and candidate.position == position for candidate in self.candidates)

    def step(self, position: int, x: Tensor, y: Tensor, position_ids: Tensor | None = None) -> float | None:
        """Does one position. A position that is already done is ignored.

        `x` and `y` are the parent layer's input and output, each `[batch, tokens, hidden_size]`; `position_ids`, `[batch, tokens]`, say
        where their documents begin (see `LayerStack`). Returns the mean training loss over
        candidates, or None where no optimizer step was finished. Raises OutOfOrder where a position was left out, and NotFinite where
        the parent's own activations are not finite.
        """
        if position <= self.position:
            return None
        if position != self.position + 1:
            raise OutOfOrder(position, self.position + 1)
        if not torch.isfinite(y).all():
            raise NotFinite("the parent's activation", self.index, PARENT, position)
        self._check_own_dtype(y)
        phase, number = self.schedule.phase(position)
        arguments = self.stack.layer_arguments(x, self.index, position_ids)
        loss = None
        if phase == "calibrate":
            with torch.no_grad(), self.statistics.watch(self.layer, self.stack.descriptor):
                self.stack.run_layer(self.layer, self.index, x, arguments)
            if number == self.schedule.calibrate - 1:
                self._start_candidates()
        elif phase not in ("try", "train") or any(c.still_trains for c in self._behind(position)):
            with torch.no_grad(), self._autocast(x):
                middle = self.stack.run_layer(self.parent["attention"], self.index, x, arguments)
            parent = LayerPass(x, middle, y)
            if phase == "train":
                loss = self._train(number, position, parent, arguments)
            elif phase == "try":
                self._try(number, position, parent, arguments)
            else:
                self._validate(phase, position, parent, arguments)
        if position == self.schedule.positions - 1:
            self._measure_sensitivity(x[:1], y[:1], None if position_ids is None else position_ids[:1])
        for candidate in self._behind(position):
            candidate.position = position
        self.position = position
        return loss

    def _check_own_dtype(self, y: Tensor) -> None:
        """Raises ParentError where a parent in float16 has activations that float16 does not hold: its children would be of its dtype."""
        if self.stack.own_dtype != torch.float16:
            return
        largest, most = float(y.abs().max()), torch.finfo(torch.float16).max
        if largest > most:
            problem = f"activations behind layer {self.index} reach {largest:.3g}, and the parent's float16 ends at {most:g}"
            raise ParentError("parent", problem, "save it in bfloat16 or float32, in which its children will be, too")

    def _behind(self, position: int) -> list[Candidate]:
        """Those that have not done a position yet: others may be further, from a checkpoint."""
        return [candidate for candidate in self.candidates if candidate.position < position]

    def _autocast(self, x: Tensor) -> AbstractContextManager[object]:
        """The dtype that forwards compute in. Weights, statistics, losses and the optimizer stay float32."""
        return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.config.compute_dtype == "bfloat16")

    def _start_candidates(self) -> None:
        """Those that no checkpoint had."""
        restored = {candidate.choice for candidate in self.candidates}
        for choice in self.choices:
            if choice in restored:
                continue
            candidate = Candidate.of(choice, self.stack, self.index, self.config)
            if self.starts is None:
                candidate.initialise(self.layer, self.statistics)
            else:
                candidate.start_from_trained(self.starts(self.index, choice))
            self._take(candidate)
        self.statistics = Statistics()
        give_back_freed_memory()

    def _take(self, candidate: Candidate) -> None:
        """Candidates stand in the order of choices, whenever they came."""
        self.candidates = sorted([*self.candidates, candidate], key=lambda c: self.choices.index(c.choice))

    def _run(self, candidate: Candidate, parent: LayerPass, arguments: dict[str, Any]) -> LayerPass:
        """Runs the candidate on the parent's input.

        A half that is not replaced is the parent's own. The output of the parent's attention half is in `parent.middle` already.
        """
        with self._autocast(parent.start):
            middle = parent.middle
            if "attention" in candidate.halves:
                middle = self.stack.run_layer(candidate.halves["attention"], self.index, parent.start, arguments)
            end = self.stack.run_layer(candidate.halves.get("ffn", self.parent["ffn"]), self.index, middle, arguments)
        return LayerPass(parent.start, middle, end)

    def _try(self, number: int, position: int, parent: LayerPass, arguments: dict[str, Any]) -> None:
        """A micro-batch of a trial of a learning rate. A trial whose loss is not finite ends there, and waits for the others' end."""
        steps, accumulate = self.schedule.trial_steps, self.schedule.accumulate
        trial, rest = divmod(number, steps * accumulate)
        step, place = divmod(rest, accumulate)
        rate = LearningRate.of_bld(RATES[trial], steps, WARMUP).at(step)
        for candidate in self._behind(position):
            if not candidate.still_trains:
                continue
            if None not in candidate.record.trial:
                child = self._run(candidate, parent, arguments)
                loss = training_loss(self.config.loss, candidate.choice.replaced, child, parent)
                candidate.accumulate(loss / accumulate)
                if place + 1 == accumulate:
                    candidate.record.trial.append(candidate.finish_step(rate, self.config.gradient_clip))
            if rest + 1 == steps * accumulate:
                candidate.end_trial()

    def _train(self, number: int, position: int, parent: LayerPass, arguments: dict[str, Any]) -> float | None:
        step, place = divmod(number, self.schedule.accumulate)
        losses = []
        for candidate in self._behind(position):
            if not candidate.still_trains:
                continue
            child, record = self._run(candidate, parent, arguments), candidate.record
            loss = training_loss(self.config.loss, candidate.choice.replaced, child, parent)
            candidate.accumulate(loss / self.schedule.accumulate)
            if place + 1 < self.schedule.accumulate:
                continue
            mean = candidate.finish_step(self._rate(candidate, step), self.config.gradient_clip)
            if mean is None:
                candidate.go_back(str(NotFinite("the loss", self.index, self._name(candidate), position)))
                continue
            losses.append(mean)
            record.curve.append(mean)
            if has_risen(record.curve, record.attempt_from, self.schedule.rise_window, record.start_training_loss):
                candidate.go_back(f"the loss rose above its start at micro-batch {position}; lower library.learning_rate")
            elif self._is_flat(record.curve, record.attempt_from):
                candidate.stop()
        return sum(losses) / len(losses) if losses else None

    def _is_flat(self, curve: list[float], attempt_from: int) -> bool:
        rule = self.config.early_stop
        begin = max(self.learning_rate.warmup_steps, attempt_from)
        if rule is None or len(curve) == self.schedule.steps or (len(curve) - begin) % rule.window:
            return False
        return is_flat(curve[begin:], rule)

    @torch.no_grad()
    def _validate(self, phase: Phase, position: int, parent: LayerPass, arguments: dict[str, Any]) -> None:
        for candidate in self._behind(position):
            record = candidate.record
            child = self._run(candidate, parent, arguments)
            loss = float(block_loss(child, parent))
            if not math.isfinite(loss):
                candidate.fail(str(NotFinite("the validation loss", self.index, self._name(candidate), position)))
            if phase == "validate_start":
                record.start_loss += loss / self.schedule.validate
                as_trained = float(training_loss(self.config.loss, candidate.choice.replaced, child, parent))
                record.start_training_loss += as_trained / self.schedule.validate
            else:
                record.final_loss += loss / self.schedule.validate

    @torch.no_grad()
    def _measure_sensitivity(self, x: Tensor, y: Tensor, position_ids: Tensor | None) -> None:
        """Of the weights that will be kept, on one sequence, in float32. Candidates whose start is kept have it loaded from here on."""
        arguments = self.stack.layer_arguments(x, self.index, position_ids)

        def half(layer: nn.Module, hidden: Tensor) -> Tensor:
            return self.stack.run_layer(layer, self.index, hidden, arguments)

        inputs = [x, *changed_inputs(x, self.index)]
        middles = [half(self.parent["attention"], hidden) for hidden in inputs]
        ends = [half(self.parent["ffn"], middle) for middle in middles]
        own = sensitivity(ends, ends[0])
        for candidate in self.candidates:
            if not candidate.is_better:
                candidate.load_start()
            attention, ffn = candidate.halves.get("attention"), candidate.halves.get("ffn", self.parent["ffn"])
            between = middles if attention is None else [half(attention, hidden) for hidden in inputs]
            candidate.record.sensitivity = sensitivity([half(ffn, middle) for middle in between], y)
            candidate.record.parent_sensitivity = own

    def _name(self, candidate: Candidate) -> str:
        return self.space.entry(candidate.choice)[1]

    def results(self) -> list[tuple[LibraryRow, dict[str, Tensor], list[float]]]:
        """For every candidate: its row, the weights for the library, and its loss curve.

        The weights are the trained ones where their validation loss is below that of the start, and otherwise the start.
        """
        assert self.finished, "the last position is not done"
        out, parent = [], ParentNorms(self.layer, self.stack.descriptor)
        step_tokens = self.schedule.accumulate * self.config.micro_batch_tokens
        for c in self.candidates:
            record = c.record
            better = c.is_better
            spared = self.schedule.steps - len(record.curve) if record.stopped else 0
            row = LibraryRow(
                self.index,
                *self.space.entry(c.choice),
                record.initialisation,
                record.start_loss,
                record.final_loss,
                "trained" if better else "start",
                len(record.curve) * step_tokens,
                record.failure,
                spared * step_tokens,
                record.returns,
                *norms(c.halves, parent),
                record.sensitivity,
                record.parent_sensitivity,
            )
            out.append((row, c.weights() if better else c.start, record.curve))
        return out

    def tried(self, kind: str, variant: str) -> list[RateTrial]:
        """The trials of one of its entries, in order; none where its rate was set, or nothing is trained."""
        record = next(c.record for c in self.candidates if self.space.entry(c.choice) == (kind, variant))
        steps, of = self.schedule.trial_steps, (self.index, kind, variant)
        return [RateTrial(*of, rate, loss, steps, rate == record.rate) for rate, loss in zip(RATES, record.trials, strict=False)]

    def restore(self, choice: LayerChoice, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Continues with one of its choices from the checkpoint of a candidate, wherever that was trained.

        Those that have none begin anew, and those that are further wait for them.
        """
        candidate = Candidate.of(choice, self.stack, self.index, self.config)
        candidate.restore(tensors, metadata)
        self._take(candidate)
        if len(self.candidates) == len(self.choices):
            self.position = min(c.position for c in self.candidates)
