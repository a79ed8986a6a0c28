"""One choice for one layer in training: its modules, its optimizer, and what has happened to it so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from puzzle_ray.artifacts import LayerChoice, SubblockKind
from puzzle_ray.calibration import Statistics
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.models.blocks import LayerStack, load_subblock, subblock_state, swapped
from puzzle_ray.variants.base import find_variant


@dataclass
class TrainingRecord:
    """Losses and fate. `curve` is the training loss of every micro-batch; start and final loss are means over validation."""

    initialisation: str = ""
    start_loss: float = 0.0
    final_loss: float = 0.0
    curve: list[float] = field(default_factory=list)
    stopped: bool = False
    failure: str = ""


def by_kind(weights: Mapping[str, Tensor]) -> dict[SubblockKind, dict[str, Tensor]]:
    """`attention/self_attn.o_proj.weight` ... -> the states that `puzzle_ray.models.blocks.swapped` takes."""
    found: dict[SubblockKind, dict[str, Tensor]] = {}
    for key, value in weights.items():
        kind, _, name = key.partition("/")
        found.setdefault("attention" if kind == "attention" else "ffn", {})[name] = value
    return found


@dataclass
class Candidate:
    """`halves`: for every replaced subblock a layer whose other half is a no-op. `start`: the weights before training, by
    `<kind>/<name inside the layer>`. `optimizer` is None where nothing can be trained."""

    choice: LayerChoice
    descriptor: Descriptor
    halves: Mapping[SubblockKind, nn.Module]
    optimizer: torch.optim.AdamW | None
    course: TrainingRecord = field(default_factory=TrainingRecord)
    start: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, choice: LayerChoice, stack: LayerStack, index: int, config: LibraryConfig) -> Candidate:
        """With weights still undefined."""
        layer, descriptor = stack.layer(index), stack.descriptor
        halves, parameters = {}, []
        for kind in choice.replaced:
            variant = choice.variant(kind)
            half = swapped(layer, LayerChoice.half(kind, variant), descriptor, stack.config)
            halves[kind] = half
            if find_variant(variant, kind)[0].trainable:
                own = descriptor.prefixes(kind)
                parameters += [p.requires_grad_() for name, p in half.named_parameters() if name.startswith(own)]
        optimizer = None
        if parameters:
            rate, decay = config.learning_rate, config.weight_decay
            optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, betas=(0.9, 0.95))
        return cls(choice, descriptor, halves, optimizer)

    def take(self, states: Mapping[SubblockKind, Mapping[str, Tensor]]) -> None:
        """Starts from halves that were trained elsewhere."""
        self._load({f"{kind}/{name}": value for kind, state in states.items() for name, value in state.items()})
        self.course.initialisation = "trained halves"
        self.start = self.weights()

    @property
    def learns(self) -> bool:
        return self.optimizer is not None and not self.course.failure and not self.course.stopped

    def initialise(self, parent: nn.Module, statistics: Statistics) -> None:
        """Fills the weights from the parent layer's, every half by its variant's own method."""
        words = []
        for kind, half in self.halves.items():
            variant, argument = find_variant(self.choice.variant(kind), kind)
            words.append(variant.initialise(half, parent, argument, kind, self.descriptor, statistics))
        self.course.initialisation = "; ".join(words)
        self.start = self.weights()

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights as they are now, by `<kind>/<name inside the layer>`."""
        return {name: value.clone() for name, value in self._now().items()}

    def _now(self) -> dict[str, Tensor]:
        """The weights themselves."""
        return {
            f"{kind}/{name}": value.detach()
            for kind, half in self.halves.items()
            for name, value in subblock_state(half, kind, self.descriptor).items()
        }

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        states = by_kind(weights)
        for kind, half in self.halves.items():
            load_subblock(half, kind, self.descriptor, states.get(kind, {}))

    def stop(self) -> None:
        """No more training; the optimizer forgets its moments."""
        self.course.stopped = True
        self._forget()

    def fail(self, reason: str) -> None:
        """No more training, and back to the start."""
        if not self.course.failure:
            self.course.failure = reason
            self._load(self.start)
            self._forget()

    def _forget(self) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
            self.optimizer.state.clear()

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors (the live ones, to be written at once) and JSON-able facts to continue from."""
        tensors = {f"start/{name}": value for name, value in self.start.items()}
        tensors |= {f"now/{name}": value for name, value in self._now().items()}
        for number, slots in (self.optimizer.state_dict()["state"] if self.optimizer else {}).items():
            tensors |= {f"adam/{number}/{slot}": torch.as_tensor(value) for slot, value in slots.items()}
        return tensors, asdict(self.course)

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """The inverse of `checkpoint`."""

        def part(word: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{word}/"): value for key, value in tensors.items() if key.startswith(f"{word}/")}

        self.course, self.start = TrainingRecord(**facts), part("start")
        self._load(part("now"))
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in part("adam").items():
            number, _, slot = key.partition("/")
            slots.setdefault(int(number), {})[slot] = value
        if self.optimizer is not None and slots:
            self.optimizer.load_state_dict({"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]})
