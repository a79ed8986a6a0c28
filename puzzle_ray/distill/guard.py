"""Global distillation is watched on held-out text, so that it never makes a child worse.

The held-out KL is measured before the first step, at regular steps, and at the end. The best weights are kept. Where the KL rises above
that of the start, or the loss is no longer finite, training goes back to the best weights and goes on with half the learning rate; after
`MAX_RETURNS` such returns it ends. What is published are the best weights: those of the start, where nothing was better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from puzzle_ray.distill.losses import kl_per_sequence, next_token_loss_per_sequence

MAX_RETURNS = 3


@dataclass(frozen=True)
class HeldoutRow:
    """One look at held-out text after `step` optimizer steps, in nats per token. `returned`: 1 where training went back from here."""

    step: int
    kl: float
    loss: float
    rate_factor: float
    returned: int = 0


class HeldoutGuard:
    """Measures KL(parent || child) on fixed batches of ids `[sequences, tokens]`, and remembers the best weights."""

    def __init__(
        self,
        child: Any,
        parent: Any,
        parameters: Mapping[str, nn.Parameter],
        batches: Sequence[Tensor],
        every_steps: int,
        agree: Callable[[Sequence[float]], list[float]] = list,
    ) -> None:
        """`agree` makes one answer of what several processes measured."""
        self.child, self.parent, self.parameters, self.agree = child, parent, parameters, agree
        device = next(iter(parameters.values())).device
        self.batches, self.every_steps = [ids.to(device) for ids in batches], every_steps
        self.rows: list[HeldoutRow] = []
        self.best: dict[str, Tensor] = {}
        self.rate_factor = 1.0

    @property
    def best_row(self) -> HeldoutRow:
        """Of the best weights; the earliest of equally good ones."""
        return min(self.rows, key=lambda row: (row.kl, row.step))

    @property
    def num_returns(self) -> int:
        return sum(row.returned for row in self.rows)

    @property
    def gave_up(self) -> bool:
        return self.num_returns > MAX_RETURNS

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether it has to look after so many steps. It looks once at every step, also where training came back to it."""
        return step % self.every_steps == 0 or step == total_steps

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """(KL, next-token loss) on the held-out text, means over sequences, in float32."""
        kl: list[float] = []
        loss: list[float] = []
        for ids in self.batches:
            parent, child = (
                functional.log_softmax(model(ids, use_cache=False).logits.float(), dim=-1) for model in (self.parent, self.child)
            )
            kl += kl_per_sequence(parent, child).tolist()
            loss += next_token_loss_per_sequence(child, ids).tolist()
        mean_kl, mean_loss = self.agree([math.fsum(kl) / len(kl), math.fsum(loss) / len(loss)])
        return mean_kl, mean_loss

    def look(self, step: int) -> bool:
        """Measures, and keeps the weights where they are the best so far. False where training must go back."""
        kl, loss = self.measure()
        if self.rows and not (math.isfinite(kl) and kl <= self.rows[0].kl):
            self.rows.append(HeldoutRow(step, kl if math.isfinite(kl) else math.inf, loss, self.rate_factor, returned=1))
            return False
        self.rows.append(HeldoutRow(step, kl, loss, self.rate_factor))
        if self.best_row is self.rows[-1]:
            self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        return True

    def diverged(self, step: int) -> None:
        """The loss of a step was not finite: training must go back."""
        self.rows.append(HeldoutRow(step, math.inf, math.inf, self.rate_factor, returned=1))

    @torch.no_grad()
    def restore_best(self) -> int:
        """Gives the child its best weights. Returns the step that they are from."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.best[name])
        return self.best_row.step

    def state_tensors(self) -> dict[str, Tensor]:
        """What has to be in a checkpoint."""
        rows = torch.tensor([astuple(row) for row in self.rows], dtype=torch.float64).view(-1, len(fields(HeldoutRow)))
        factor = torch.tensor([self.rate_factor], dtype=torch.float64)
        return {f"best.{name}": value.cpu() for name, value in self.best.items()} | {"rows": rows, "rate_factor": factor}

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_tensors`."""
        self.rows = [HeldoutRow(int(r[0]), r[1], r[2], r[3], int(r[4])) for r in state["rows"].tolist()]
        self.rate_factor = float(state["rate_factor"])
        self.best = {name: state[f"best.{name}"].to(parameter.device) for name, parameter in self.parameters.items() if self.rows}

    def facts(self) -> dict[str, Any]:
        """What the artifact says about it."""
        first, best = self.rows[0], self.best_row
        kept = "start" if best.step == 0 else f"step {best.step}"
        return {
            "kept": kept,
            "heldout_kl_before": first.kl,
            "heldout_kl": best.kl,
            "heldout_loss": best.loss,
            "returns": self.num_returns,
        }
