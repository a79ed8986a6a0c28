"""Global distillation is watched on held-out text, so that it never makes a child worse.

The held-out KL is measured before the first step, at regular steps, and at the end. The best weights are kept. Where the KL rises above
that of the start, or the loss is no longer finite, training goes back to the best weights and goes on with half the learning rate; after
`MAX_RETURNS` such returns it ends. What is published are the best weights: those of the start, where nothing was better.

Adam's first steps are as large as the rate whatever the gradient, and often take the KL up for a moment that half the rate would take up as
well. So a rise within `SETTLING` steps of the start, or of the step that training went back to, counts only at the end. Short trainings
alone look so early.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from puzzle_ray.distill.child_loss import States
from puzzle_ray.distill.losses import kl_per_token
from puzzle_ray.models.head import Head, final_states

MAX_RETURNS = 3
SETTLING = 5  # optimizer steps


@dataclass(frozen=True)
class HeldoutRow:
    """One look at held-out text after `step` optimizer steps, in nats per token. `returned`: 1 where training went back from here."""

    step: int
    kl: float
    loss: float
    rate_factor: float
    returned: int = 0


@torch.no_grad()
def heldout_losses(child: Any, parent: Any, input_ids: Tensor, states: States = final_states) -> tuple[Tensor, Tensor]:
    """(KL(parent || child), next-token loss) of ids `[sequences, tokens]`, means over the tokens of each sequence: `[sequences]`.

    In float32, from the logits of a few tokens at a time.
    """
    parent_final, child_final = states(parent, input_ids), states(child, input_ids)
    heads, flat = (Head.of(parent), Head.of(child)), parent_final.flatten(0, 1)
    following = input_ids.roll(-1, dims=1).flatten().unsqueeze(1)  # of a sequence's last token no loss is taken
    kl, loss = torch.empty(2, len(flat), dtype=torch.float32, device=flat.device)
    for part, own_NV in heads[1].chunks(child_final):
        log_probs = own_NV.float().log_softmax(-1)
        kl[part] = kl_per_token(heads[0].logits(flat[part]).float().log_softmax(-1), log_probs)
        loss[part] = -log_probs.gather(1, following[part]).squeeze(1)
    return kl.view(input_ids.shape).mean(-1), loss.view(input_ids.shape)[:, :-1].mean(-1)


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
        running: Callable[[], AbstractContextManager[States]] = lambda: nullcontext(final_states),
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`agree` makes one answer of what several processes measured. `running` tells how models are run while it is open.

        `kept` are the weights that the child has meanwhile, where they are not `parameters`.
        """
        self.child, self.parent, self.parameters, self.agree, self.running = child, parent, parameters, agree, running
        self.batches, self.every_steps, self.kept = batches, every_steps, kept or parameters
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
        with self.running() as states:
            for ids in self.batches:
                own_kl, own_loss = heldout_losses(self.child, self.parent, ids, states)
                kl += own_kl.tolist()
                loss += own_loss.tolist()
        mean_kl, mean_loss = self.agree([math.fsum(kl) / len(kl), math.fsum(loss) / len(loss)])
        return mean_kl, mean_loss

    @property
    def _begun_at(self) -> int:
        """The step that training began with, or went back to the last time."""
        last = max((number for number, row in enumerate(self.rows) if row.returned), default=0)
        return min(self.rows[: last + 1], key=lambda row: (row.kl, row.step)).step

    def look(self, step: int, last: bool = False) -> bool:
        """Measures, and keeps the weights where they are the best so far. False where training must go back. `last`: of all steps."""
        kl, loss = self.measure()
        kl = kl if math.isfinite(kl) else math.inf  # NaN compares with nothing, and would stay the least of all that is compared
        settled = last or math.isinf(kl) or not self.rows or step - self._begun_at >= SETTLING
        if self.rows and settled and not (math.isfinite(kl) and kl <= self.rows[0].kl):
            self.rows.append(HeldoutRow(step, kl, loss, self.rate_factor, returned=1))
            return False
        self.rows.append(HeldoutRow(step, kl, loss, self.rate_factor))
        if self.best_row is self.rows[-1]:
            self._keep()
        return True

    @torch.no_grad()
    def _keep(self) -> None:
        if not self.best:
            self.best = {name: value.detach().clone() for name, value in self.kept.items()}
            return
        for name, value in self.kept.items():
            self.best[name].copy_(value)

    def diverged(self, step: int) -> None:
        """The loss of a step was not finite: training must go back."""
        self.rows.append(HeldoutRow(step, math.inf, math.inf, self.rate_factor, returned=1))

    @torch.no_grad()
    def restore_best(self) -> int:
        """Gives the child its best weights. Returns the step that they are from."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.best[name])
        return self.best_row.step

    def small_tensors(self) -> dict[str, Tensor]:
        """What has to be in a checkpoint beside the best weights."""
        rows = torch.tensor([astuple(row) for row in self.rows], dtype=torch.float64).view(-1, len(fields(HeldoutRow)))
        return {"rows": rows, "rate_factor": torch.tensor([self.rate_factor], dtype=torch.float64)}

    def load_small_tensors(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `small_tensors`. The best weights are to be filled afterwards, where there are any."""
        self.rows = [HeldoutRow(int(r[0]), r[1], r[2], r[3], int(r[4])) for r in state["rows"].tolist()]
        self.rate_factor = float(state["rate_factor"])
        self.best = {name: torch.zeros_like(p.detach()) for name, p in self.parameters.items()} if self.rows else {}

    def facts(self) -> dict[str, Any]:
        """What the artifact says about it. `not_finite` of the returns are from a loss, gradient or KL that was no number."""
        first, best = self.rows[0], self.best_row
        kept = "start" if best.step == 0 else f"step {best.step}"
        return {
            "kept": kept,
            "heldout_kl_before": first.kl,
            "heldout_kl": best.kl,
            "heldout_loss": best.loss,
            "returns": self.num_returns,
            "not_finite": sum(row.returned for row in self.rows if not math.isfinite(row.kl)),
        }
