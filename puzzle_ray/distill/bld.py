"""Blockwise local distillation (paper, section 3.2): every variant of a block learns to mimic its parent block, alone.

A trainer is a state machine over positions 0, 1, 2, ...: it gathers statistics on the first micro-batches, starts every variant from
them, measures each on validation micro-batches, trains, and measures again. What it does at a position depends on that position and
on what came before, nothing else, so a trainer that dies continues from its checkpoint to the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from puzzle_ray.artifacts import KINDS, PARENT, LayerChoice, LayerSpace, SubblockKind
from puzzle_ray.blocks import LayerStack, load_subblock, subblock_state, swapped
from puzzle_ray.config import LibraryConfig
from puzzle_ray.errors import NotFinite, OutOfOrder
from puzzle_ray.variants import find, needs
from puzzle_ray.variants._statistics import Statistics

Phase = Literal["calibrate", "validate_start", "train", "validate_end"]


def normalised_mse(child: Tensor, parent: Tensor) -> Tensor:
    """MSE(parent, child) / MSE(parent, 0), in fp32: 0 is a perfect copy, 1 no better than zeros (paper, section 3.2)."""
    target = parent.float()
    return (child.float() - target).square().mean() / target.square().mean().clamp_min(1e-30)


def learning_rate(peak: float, step: int, total: int, warmup_fraction: float) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak. `step` counts from 0."""
    warmup = max(1, round(total * warmup_fraction))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Schedule:
    """How many micro-batches each phase takes, and which data number each position reads."""

    calibrate: int
    validate: int
    train: int

    @classmethod
    def of(cls, config: LibraryConfig) -> Schedule:
        def count(tokens: int) -> int:
            return max(1, math.ceil(tokens / config.micro_batch_tokens))

        return cls(count(config.calibration_tokens), count(config.validation_tokens), count(config.tokens))

    @property
    def positions(self) -> int:
        return self.calibrate + 2 * self.validate + self.train

    def phase(self, position: int) -> tuple[Phase, int]:
        """The phase of a position, and its number within the phase."""
        ends: tuple[tuple[Phase, int], ...] = (
            ("calibrate", self.calibrate),
            ("validate_start", self.validate),
            ("train", self.train),
            ("validate_end", self.validate),
        )
        for name, length in ends:
            if position < length:
                return name, position
            position -= length
        raise ValueError(f"position {position} is past the end")

    def data_number(self, position: int) -> int:
        """Which micro-batch of the stream a position reads: both validations the same ones, not trained on in the first epoch."""
        phase, number = self.phase(position)
        if phase.startswith("validate"):
            return number
        return self.validate + number + (self.calibrate if phase == "train" else 0)


@dataclass
class _Candidate:
    """One variant of one subblock in training. `module` is the whole layer for attention, the FFN half for an FFN."""

    kind: SubblockKind
    variant: str
    module: nn.Module
    initialisation: str
    start: dict[str, Tensor]
    optimizer: torch.optim.AdamW | None
    start_loss: float = 0.0
    final_loss: float = 0.0
    curve: list[float] = field(default_factory=list)
    failure: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.variant}"


@dataclass(frozen=True)
class LibraryRow:
    """One trained variant. Losses are normalised MSE on validation micro-batches; `kept` says which weights are in the library."""

    layer: int
    kind: str
    variant: str
    initialisation: str
    start_loss: float
    final_loss: float
    kept: str
    tokens: int
    failure: str


class LayerTrainer:
    """All variants of one layer. `step(position, x, y)` takes the parent layer's input and output `[batch, tokens, hidden_size]`."""

    def __init__(self, index: int, stack: LayerStack, space: LayerSpace, config: LibraryConfig) -> None:
        self.index, self.stack, self.space, self.config = index, stack, space, config
        self.schedule = Schedule.of(config)
        self.layer = stack.layer(index).requires_grad_(False)
        self.descriptor, self.model_config = stack.descriptor, stack.config
        self.statistics = Statistics(needs(space.attention, "attention") | needs(space.ffn, "ffn"))
        self.candidates: list[_Candidate] = []
        self.position = -1  # the last one done
        noop_ffn = LayerChoice(PARENT, "noop")
        self.attention_half = swapped(self.layer, noop_ffn, self.descriptor, self.model_config)

    @property
    def finished(self) -> bool:
        return self.position == self.schedule.positions - 1

    def step(self, position: int, x: Tensor, y: Tensor) -> float | None:
        """Does one position; what was already done is ignored. Returns the mean training loss, if it trained.

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
            with torch.no_grad(), self.statistics.watch(self.layer, self.descriptor):
                self.stack.run_layer(self.layer, self.index, x, arguments)
            if number == self.schedule.calibrate - 1:
                self._start_variants()
        else:
            with torch.no_grad():
                middle = self.stack.run_layer(self.attention_half, self.index, x, arguments)
            inputs: dict[SubblockKind, Tensor] = {"attention": x, "ffn": middle}
            loss = self._train(number, position, inputs, y, arguments) if phase == "train" else None
            if phase != "train":
                self._validate(phase, inputs, y, arguments)
        self.position = position
        return loss

    def _start_variants(self) -> None:
        for kind in KINDS:
            for name in self.space.variants(kind):
                if name == PARENT:
                    continue
                candidate = self._new_candidate(kind, name)
                variant, argument = find(name, kind)
                candidate.initialisation = variant.initialise(
                    candidate.module, self.layer, argument, kind, self.descriptor, self.statistics
                )
                candidate.start = {k: v.clone() for k, v in subblock_state(candidate.module, kind, self.descriptor).items()}
                self.candidates.append(candidate)
        self.statistics = Statistics()

    def _new_candidate(self, kind: SubblockKind, name: str) -> _Candidate:
        choice = LayerChoice(attention=name) if kind == "attention" else LayerChoice(attention="noop", ffn=name)
        module = swapped(self.layer, choice, self.descriptor, self.model_config)
        optimizer = None
        if find(name, kind)[0].trainable:
            prefixes = self.descriptor.prefixes(kind)
            parameters = [p.requires_grad_() for n, p in module.named_parameters() if n.startswith(prefixes)]
            optimizer = torch.optim.AdamW(
                parameters, lr=self.config.learning_rate, weight_decay=self.config.weight_decay, betas=(0.9, 0.95)
            )
        return _Candidate(kind, name, module, "", {}, optimizer)

    def _loss(self, candidate: _Candidate, inputs: Mapping[SubblockKind, Tensor], y: Tensor, arguments: dict[str, Any]) -> Tensor:
        out = self.stack.run_layer(candidate.module, self.index, inputs[candidate.kind], arguments)
        return normalised_mse(out, y)

    def _train(
        self, number: int, position: int, inputs: Mapping[SubblockKind, Tensor], y: Tensor, arguments: dict[str, Any]
    ) -> float:
        rate = learning_rate(self.config.learning_rate, number, self.schedule.train, self.config.warmup_fraction)
        losses = []
        for candidate in self.candidates:
            if candidate.optimizer is None or candidate.failure:
                continue
            group = candidate.optimizer.param_groups[0]
            group["lr"] = rate
            loss = self._loss(candidate, inputs, y, arguments)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(group["params"], self.config.gradient_clip)
            if not (torch.isfinite(loss) and torch.isfinite(norm)):
                candidate.failure = str(NotFinite("the loss", self.index, candidate.variant, position))
                load_subblock(candidate.module, candidate.kind, self.descriptor, candidate.start)
                continue
            candidate.optimizer.step()
            candidate.optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            candidate.curve.append(losses[-1])
        return sum(losses) / max(1, len(losses))

    @torch.no_grad()
    def _validate(self, phase: Phase, inputs: Mapping[SubblockKind, Tensor], y: Tensor, arguments: dict[str, Any]) -> None:
        for candidate in self.candidates:
            share = float(self._loss(candidate, inputs, y, arguments)) / self.schedule.validate
            if phase == "validate_start":
                candidate.start_loss += share
            else:
                candidate.final_loss += share

    def results(self) -> list[tuple[LibraryRow, dict[str, Tensor], list[float]]]:
        """For every variant: its row, the weights to keep (the better of start and trained, by validation), its loss curve."""
        assert self.finished, "the last position is not done"
        out = []
        for c in self.candidates:
            better = c.optimizer is not None and not c.failure and c.final_loss < c.start_loss
            state = (
                {k: v.detach().clone() for k, v in subblock_state(c.module, c.kind, self.descriptor).items()}
                if better
                else c.start
            )
            tokens = len(c.curve) * self.config.micro_batch_tokens
            row = LibraryRow(
                self.index,
                c.kind,
                c.variant,
                c.initialisation,
                c.start_loss,
                c.final_loss,
                "trained" if better else "start",
                tokens,
                c.failure,
            )
            out.append((row, state, c.curve))
        return out

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Tensors and metadata to continue from; None before the variants exist (calibration starts over)."""
        if not self.candidates:
            return None
        tensors: dict[str, Tensor] = {}
        about = []
        for c in self.candidates:
            tensors |= {f"{c.name}/start/{k}": v for k, v in c.start.items()}
            tensors |= {f"{c.name}/now/{k}": v for k, v in subblock_state(c.module, c.kind, self.descriptor).items()}
            for number, state in (c.optimizer.state_dict()["state"] if c.optimizer else {}).items():
                tensors |= {f"{c.name}/adam/{number}/{k}": torch.as_tensor(v) for k, v in state.items()}
            facts = asdict_without(c, ("module", "start", "optimizer"))
            about.append(facts)
        return tensors, {"position": str(self.position), "candidates": json.dumps(about)}

    def restore(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """The inverse of `checkpoint`."""
        self.candidates = []
        for facts in json.loads(metadata["candidates"]):
            candidate = self._new_candidate(facts["kind"], facts["variant"])
            for key, value in facts.items():
                setattr(candidate, key, value)

            def part(word: str, name: str = candidate.name) -> dict[str, Tensor]:
                prefix = f"{name}/{word}/"
                return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

            candidate.start = part("start")
            load_subblock(candidate.module, candidate.kind, self.descriptor, part("now"))
            adam = part("adam")
            if candidate.optimizer is not None and adam:
                state: dict[int, dict[str, Tensor]] = {}
                for key, value in adam.items():
                    number, _, slot = key.partition("/")
                    state.setdefault(int(number), {})[slot] = value
                groups = candidate.optimizer.state_dict()["param_groups"]
                candidate.optimizer.load_state_dict({"state": state, "param_groups": groups})
            self.candidates.append(candidate)
        self.position = int(metadata["position"])


def asdict_without(value: _Candidate, names: tuple[str, ...]) -> dict[str, Any]:
    """The plain fields of a candidate."""
    return {k: v for k, v in vars(value).items() if k not in names}


def row_metadata(row: LibraryRow, curve: list[float]) -> dict[str, str]:
    """What stands in a published variant's safetensors header."""
    return {"row": json.dumps(asdict(row)), "curve": json.dumps(curve)}
