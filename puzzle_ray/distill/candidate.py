"""One choice for one layer while it trains: its modules, its optimizer, and the record of its training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from puzzle_ray.artifacts import LayerChoice, SubblockKind
from puzzle_ray.calibration import Statistics
from puzzle_ray.distill.guard import MAX_RETURNS
from puzzle_ray.distill.rate_trials import RATES, best_rate, judged
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.models.blocks import LayerStack, load_subblock, subblock_state, swapped
from puzzle_ray.variants.base import find_variant


@dataclass
class TrainingRecord:
    """What has happened to a candidate so far.

    `curve` is the training loss of every optimizer step. `start_loss` and `final_loss` are means over the validation micro-batches;
    `start_training_loss` is the same as `start_loss`, of the loss that is trained on.
    `stopped` says that training ended early because the loss was flat. `failure` says what went wrong; it is empty otherwise.
    `returns` counts how often training went back to the start, and `attempt_from` is the optimizer step after the last time. `sensitivity`
    and `parent_sensitivity` are as of `puzzle_ray.distill.conditioning`, of the weights that are kept. `trials` are the losses of the
    learning rates that were tried, None where one was not finite, `trial` those of the steps of a trial that is not over, and `rate` is
    what was found; None where nothing is tried.
    """

    initialisation: str = ""
    start_loss: float = 0.0
    final_loss: float = 0.0
    start_training_loss: float = 0.0
    curve: list[float] = field(default_factory=list)
    stopped: bool = False
    failure: str = ""
    returns: int = 0
    attempt_from: int = 0
    sensitivity: float = 0.0
    parent_sensitivity: float = 0.0
    trials: list[float | None] = field(default_factory=list)
    trial: list[float | None] = field(default_factory=list)
    rate: float | None = None


def states_by_kind(weights: Mapping[str, Tensor]) -> dict[SubblockKind, dict[str, Tensor]]:
    """Weights by `<kind>/<name inside the layer>` -> one state dict per kind, as `puzzle_ray.models.blocks.swapped` takes them."""
    states: dict[SubblockKind, dict[str, Tensor]] = {}
    for key, value in weights.items():
        kind, _, name = key.partition("/")
        states.setdefault("attention" if kind == "attention" else "ffn", {})[name] = value
    return states


@dataclass
class Candidate:
    """A choice in training.

    `halves` has, for every replaced subblock, a layer whose other half is a no-op. `start` has the weights before training, by
    `<kind>/<name inside the layer>`. `optimizer` is None where nothing can be trained. `position` is the last one that is done.
    `step_loss` is the loss of the micro-batches so far of an optimizer step; None between two steps.
    """

    choice: LayerChoice
    descriptor: Descriptor
    halves: Mapping[SubblockKind, nn.Module]
    optimizer: torch.optim.AdamW | None
    record: TrainingRecord = field(default_factory=TrainingRecord)
    start: dict[str, Tensor] = field(default_factory=dict)
    position: int = -1
    step_loss: Tensor | None = None

    @classmethod
    def of(cls, choice: LayerChoice, stack: LayerStack, index: int, config: LibraryConfig) -> Candidate:
        """A candidate whose weights are still undefined."""
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
            decay = config.weight_decay  # every step has a rate of its own
            optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=decay, betas=(0.9, 0.95))
        return cls(choice, descriptor, halves, optimizer)

    def start_from_trained(self, states: Mapping[SubblockKind, Mapping[str, Tensor]]) -> None:
        """Starts from halves that another library has trained."""
        self._load({f"{kind}/{name}": value for kind, state in states.items() for name, value in state.items()})
        self.record.initialisation = "trained halves"
        self._keep_start()

    @property
    def still_trains(self) -> bool:
        """Whether the next training micro-batch changes its weights."""
        return self.optimizer is not None and not self.record.failure and not self.record.stopped

    @property
    def is_better(self) -> bool:
        """Whether training made it better on validation text, once that is known. If not, its start is kept."""
        record = self.record
        return self.optimizer is not None and not record.failure and record.final_loss < record.start_loss

    def initialise(self, parent: nn.Module, statistics: Statistics) -> None:
        """Fills the weights of every half from the parent layer, by the method of its variant."""
        methods = []
        for kind, half in self.halves.items():
            variant, argument = find_variant(self.choice.variant(kind), kind)
            methods.append(variant.initialise(half, parent, argument, kind, self.descriptor, statistics))
        self.record.initialisation = "; ".join(methods)
        self._keep_start()

    def _keep_start(self) -> None:
        """In the host's memory: it is seldom asked for, and a GPU has no room to spare."""
        self.start = {name: value.to("cpu", copy=True) for name, value in self._live_weights().items()}

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights as they are now, by `<kind>/<name inside the layer>`."""
        return {name: value.clone() for name, value in self._live_weights().items()}

    def _live_weights(self) -> dict[str, Tensor]:
        """The weights themselves, not copies."""
        return {
            f"{kind}/{name}": value.detach()
            for kind, half in self.halves.items()
            for name, value in subblock_state(half, kind, self.descriptor).items()
        }

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        states = states_by_kind(weights)
        for kind, half in self.halves.items():
            load_subblock(half, kind, self.descriptor, states.get(kind, {}))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return [] if self.optimizer is None else list(self.optimizer.param_groups[0]["params"])

    def accumulate(self, loss: Tensor) -> None:
        """Adds a micro-batch's share of an optimizer step's loss, and its gradients."""
        loss.backward()
        own = loss.detach()
        self.step_loss = own if self.step_loss is None else self.step_loss + own

    def finish_step(self, rate: float, gradient_clip: float) -> float | None:
        """One step of the optimizer on what has accumulated. Returns its loss; None, without a step, where that is not finite."""
        assert self.optimizer is not None and self.step_loss is not None
        self.optimizer.param_groups[0]["lr"] = rate * 0.5**self.record.returns
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, gradient_clip)
        loss, self.step_loss = self.step_loss, None
        finite = bool(torch.isfinite(loss) and torch.isfinite(norm))
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss) if finite else None

    def stop(self) -> None:
        """Ends training. The optimizer's moments are dropped."""
        self.record.stopped = True
        self._clear_optimizer()

    def fail(self, reason: str) -> None:
        """Ends training and restores the weights from before training. A second failure changes nothing."""
        if not self.record.failure:
            self.record.failure = reason
            self.load_start()

    def go_back(self, reason: str) -> None:
        """To the weights from before training, with an optimizer that starts anew; after `MAX_RETURNS` times it fails instead."""
        if self.record.returns == MAX_RETURNS:
            self.fail(f"{reason} (for the {MAX_RETURNS + 1}th time, each at half the learning rate of the time before)")
            return
        self.record.returns += 1
        self.record.attempt_from = len(self.record.curve)
        self.load_start()

    def end_trial(self) -> None:
        """Of a learning rate: back to the start, as if nothing had been trained. After the last one its rate is known."""
        record = self.record
        record.trials.append(judged(record.trial))
        record.trial = []
        if len(record.trials) == len(RATES):
            record.rate = best_rate(record.trials)
        self.load_start()

    def load_start(self) -> None:
        """Restores the weights from before training. The optimizer's moments are dropped."""
        self._load(self.start)
        self._clear_optimizer()

    def _clear_optimizer(self) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
            self.optimizer.state.clear()

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata to continue from, beside `start_tensors`. The tensors are live.

        The loss curve is a tensor, `curve`, since a safetensors header has room for 100 MB only. In the middle of an optimizer step
        the gradients are there, too.
        """
        tensors = {f"now/{name}": value for name, value in self._live_weights().items()}
        for number, slots in (self.optimizer.state_dict()["state"] if self.optimizer else {}).items():
            tensors |= {f"adam/{number}/{slot}": torch.as_tensor(value) for slot, value in slots.items()}
        if self.step_loss is not None:
            tensors["step_loss"] = self.step_loss
            tensors |= {f"gradient/{n}": p.grad for n, p in enumerate(self.parameters) if p.grad is not None}
        record = asdict(self.record)
        tensors["curve"] = torch.tensor(record.pop("curve"), dtype=torch.float64)
        return tensors, {"position": str(self.position), "record": json.dumps(record)}

    def start_tensors(self) -> dict[str, Tensor]:
        """The weights from before training, by the names that `restore` knows. They do not change while it trains."""
        return {f"start/{name}": value for name, value in self.start.items()}

    def restore(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """The inverse of `checkpoint` and `start_tensors` together."""

        def part(word: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{word}/"): value for key, value in tensors.items() if key.startswith(f"{word}/")}

        record: dict[str, Any] = json.loads(metadata["record"])
        self.record, self.start = TrainingRecord(**record, curve=tensors["curve"].tolist()), part("start")
        self.position = int(metadata["position"])
        self._load(part("now"))
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in part("adam").items():
            number, _, slot = key.partition("/")
            slots.setdefault(int(number), {})[slot] = value
        if self.optimizer is not None and slots:
            self.optimizer.load_state_dict({"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]})
        if "step_loss" in tensors:
            parameters, gradients = self.parameters, part("gradient")
            self.step_loss = tensors["step_loss"].to(parameters[0].device)
            for n, gradient in gradients.items():
                parameter = parameters[int(n)]
                parameter.grad = torch.empty_like(parameter).copy_(gradient)  # in the parameter's layout, as autograd keeps them
