"""Blockwise local distillation (paper, section 3.2): every variant of a block learns to mimic its parent block, alone.

A trainer is a state machine over positions 0, 1, 2, ...: it gathers statistics on the first micro-batches, starts every variant from
them, measures each on validation micro-batches, trains, and measures again. What it does at a position depends on that position and
on what came before, nothing else, so a trainer that dies continues from its checkpoint to the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from puzzle_ray.artifacts import KINDS, PARENT, LayerChoice, LayerSpace, SubblockKind
from puzzle_ray.calibration import Statistics
from puzzle_ray.distill.candidate import Candidate
from puzzle_ray.distill.losses import LayerPass, block_loss, training_loss
from puzzle_ray.distill.schedule import Phase, Schedule, is_flat, learning_rate, warmup_steps
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.errors import NotFinite, OutOfOrder
from puzzle_ray.models.blocks import LayerStack, swapped
from puzzle_ray.variants.base import needs

__all__ = ["LayerTrainer", "LibraryRow", "Schedule", "row_metadata"]

Starts = Callable[[int, LayerChoice], Mapping[SubblockKind, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class LibraryRow:
    """One trained variant, or a coupled pair (kind `block`, both variants in `variant`).

    Losses are normalised MSE on validation micro-batches; `kept` says which weights are in the library; `tokens` is what it was
    trained on, `tokens_saved` what an early stop spared (0 for one that was trained to the end).
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


class LayerTrainer:
    """All that a library holds of one layer. `step(position, x, y)` takes the parent layer's input and output `[batch, tokens,
    hidden_size]`. `starts(layer, choice)` gives the weights to start from; without it, variants initialise themselves."""

    def __init__(
        self, index: int, stack: LayerStack, space: LayerSpace, config: LibraryConfig, starts: Starts | None = None
    ) -> None:
        self.index, self.stack, self.space, self.config, self.starts = index, stack, space, config, starts
        self.schedule = Schedule.of(config)
        self.layer = stack.layer(index).requires_grad_(False)
        self.statistics = Statistics(needs(space.attention, "attention") | needs(space.ffn, "ffn") if starts is None else ())
        self.candidates: list[Candidate] = []
        self.position = -1  # the last one done
        self.parent = {k: swapped(self.layer, LayerChoice.half(k, PARENT), stack.descriptor, stack.config) for k in KINDS}

    @property
    def finished(self) -> bool:
        return self.position == self.schedule.positions - 1

    def step(self, position: int, x: Tensor, y: Tensor) -> float | None:
        """Does one position; what was already done is ignored. Returns the mean training loss, if anything trained.

        Raises OutOfOrder for a gap and NotFinite when the parent's own activations are not finite.
        """
        if position <= self.position:
            return None
        if position != self.position + 1:
            raise OutOfOrder(position, self.position + 1)
        if not torch.isfinite(y).all():
            raise NotFinite("the parent's activation", self.index, PARENT, position)
        phase, number = self.schedule.phase(position)
        arguments = self.stack.layer_arguments(x, self.index)
        loss = None
        if phase == "calibrate":
            with torch.no_grad(), self.statistics.watch(self.layer, self.stack.descriptor):
                self.stack.run_layer(self.layer, self.index, x, arguments)
            if number == self.schedule.calibrate - 1:
                self._start_candidates()
        elif phase != "train" or any(c.learns for c in self.candidates):
            with torch.no_grad(), self._autocast(x):
                middle = self.stack.run_layer(self.parent["attention"], self.index, x, arguments)
            parent = LayerPass(x, middle, y)
            loss = self._train(number, position, parent, arguments) if phase == "train" else None
            if phase != "train":
                self._validate(phase, position, parent, arguments)
        self.position = position
        return loss

    def _autocast(self, x: Tensor) -> AbstractContextManager[object]:
        """What forwards compute in. Weights stay fp32, and so does what is outside: statistics, losses, optimizer."""
        return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.config.compute_dtype == "bfloat16")

    def _start_candidates(self) -> None:
        for choice in self.space.trained:
            candidate = Candidate.of(choice, self.stack, self.index, self.config)
            if self.starts is None:
                candidate.initialise(self.layer, self.statistics)
            else:
                candidate.take(self.starts(self.index, choice))
            self.candidates.append(candidate)
        self.statistics = Statistics()

    def _run(self, candidate: Candidate, parent: LayerPass, arguments: dict[str, Any]) -> LayerPass:
        """The candidate on the parent's input; halves that are the parent's are its own, the attention's already computed."""
        with self._autocast(parent.start):
            middle = parent.middle
            if "attention" in candidate.halves:
                middle = self.stack.run_layer(candidate.halves["attention"], self.index, parent.start, arguments)
            end = self.stack.run_layer(candidate.halves.get("ffn", self.parent["ffn"]), self.index, middle, arguments)
        return LayerPass(parent.start, middle, end)

    def _train(self, number: int, position: int, parent: LayerPass, arguments: dict[str, Any]) -> float | None:
        rate = learning_rate(self.config.learning_rate, number, self.schedule.train, self.config.warmup_fraction)
        losses = []
        for candidate in self.candidates:
            if candidate.optimizer is None or not candidate.learns:
                continue
            group, course = candidate.optimizer.param_groups[0], candidate.course
            group["lr"] = rate
            child = self._run(candidate, parent, arguments)
            loss = training_loss(self.config.loss, candidate.choice.replaced, child, parent)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(group["params"], self.config.gradient_clip)
            if not (torch.isfinite(loss) and torch.isfinite(norm)):
                candidate.fail(str(NotFinite("the loss", self.index, self._name(candidate), position)))
                continue
            candidate.optimizer.step()
            candidate.optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            course.curve.append(losses[-1])
            if self._is_flat(course.curve):
                candidate.stop()
        return sum(losses) / len(losses) if losses else None

    def _is_flat(self, curve: list[float]) -> bool:
        rule = self.config.early_stop
        warmup = warmup_steps(self.schedule.train, self.config.warmup_fraction)
        return rule is not None and len(curve) < self.schedule.train and is_flat(curve[warmup:], rule)

    @torch.no_grad()
    def _validate(self, phase: Phase, position: int, parent: LayerPass, arguments: dict[str, Any]) -> None:
        for candidate in self.candidates:
            course = candidate.course
            loss = float(block_loss(self._run(candidate, parent, arguments), parent))
            if not math.isfinite(loss):
                candidate.fail(str(NotFinite("the validation loss", self.index, self._name(candidate), position)))
            if phase == "validate_start":
                course.start_loss += loss / self.schedule.validate
            else:
                course.final_loss += loss / self.schedule.validate

    def _name(self, candidate: Candidate) -> str:
        return self.space.entry(candidate.choice)[1]

    def results(self) -> list[tuple[LibraryRow, dict[str, Tensor], list[float]]]:
        """For every candidate: its row, the weights to keep (the better of start and trained, by validation), its loss curve."""
        assert self.finished, "the last position is not done"
        out = []
        for c in self.candidates:
            course = c.course
            better = c.optimizer is not None and not course.failure and course.final_loss < course.start_loss
            spared = self.schedule.train - len(course.curve) if course.stopped else 0
            row = LibraryRow(
                self.index,
                *self.space.entry(c.choice),
                course.initialisation,
                course.start_loss,
                course.final_loss,
                "trained" if better else "start",
                len(course.curve) * self.config.micro_batch_tokens,
                course.failure,
                spared * self.config.micro_batch_tokens,
            )
            out.append((row, c.weights() if better else c.start, course.curve))
        return out

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Tensors and metadata to continue from; None before the candidates exist (calibration starts over)."""
        if not self.candidates:
            return None
        tensors: dict[str, Tensor] = {}
        courses = []
        for number, candidate in enumerate(self.candidates):
            own, course = candidate.checkpoint()
            tensors |= {f"{number}/{key}": value for key, value in own.items()}
            courses.append(course)
        return tensors, {"position": str(self.position), "courses": json.dumps(courses)}

    def restore(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """The inverse of `checkpoint`."""
        self.candidates = []
        for number, (choice, course) in enumerate(zip(self.space.trained, json.loads(metadata["courses"]), strict=True)):
            candidate = Candidate.of(choice, self.stack, self.index, self.config)
            own = {k.removeprefix(f"{number}/"): v for k, v in tensors.items() if k.startswith(f"{number}/")}
            candidate.restore(own, course)
            self.candidates.append(candidate)
        self.position = int(metadata["position"])


def row_metadata(row: LibraryRow, curve: list[float]) -> dict[str, str]:
    """What stands in a published variant's safetensors header."""
    return {"row": json.dumps(asdict(row)), "curve": json.dumps(curve)}
