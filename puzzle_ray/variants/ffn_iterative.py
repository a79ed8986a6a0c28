"""`ffn_iterative:N`: N FFN channels, chosen in rounds. Each round computes the contribution of the remaining channels again.

In each round the down projection W is fitted to the remaining channels by least squares on calibration tokens: W' = W M_:S M_SS^-1.
M is the second moment of the channels' activations, and S are the remaining channels. The contribution of a channel is the squared
error that its removal would add after another fit of the others: ||W'_i||^2 / (M_SS^-1)_ii. The channels with the lowest
contribution are removed, an equal number in each of `ROUNDS` rounds. The last fit stays in the variant.

`ffn:N` in contrast looks at each channel alone, once, and fits nothing. Of two channels with equal activations it keeps both. Time
grows with the cube of the parent's width, and memory with its square.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from puzzle_ray.artifacts import SubblockKind
from puzzle_ray.calibration import CHANNELS, Statistics, refit, refit_well, with_ridge
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.surgery.projections import FFNProjections
from puzzle_ray.variants.ffn import NarrowFFN

ROUNDS = 8


def most_missed(weight_OI: Tensor, moment: Tensor, width: int, rounds: int = ROUNDS) -> Tensor:
    """The indices of the `width` inputs of a projection whose removal adds the most error, in ascending order.

    `weight_OI` is `[out, in]`; `moment` is the second moment of the inputs, `[in, in]`.
    """
    whole = len(moment)
    kept = torch.arange(whole, device=moment.device)
    for number in range(1, rounds + 1):
        target = whole - (whole - width) * number // rounds
        if target == len(kept):
            continue
        inverse = torch.linalg.inv(with_ridge(moment[kept][:, kept], 1e-4))
        added_error = refit(weight_OI, moment, kept).square().sum(dim=0) / inverse.diagonal()
        kept = kept[added_error.topk(target).indices.sort().values]
    return kept


class IterativeFFN(NarrowFFN):
    name = "ffn_iterative"
    needs = (CHANNELS,)

    @torch.no_grad()
    def initialise(
        self,
        layer: nn.Module,
        parent: nn.Module,
        argument: str,
        kind: SubblockKind,
        descriptor: Descriptor,
        statistics: Statistics,
    ) -> str:
        moment = statistics.channel_moment
        assert moment is not None, "no calibration tokens were seen"
        old, new = FFNProjections.of(parent, descriptor), FFNProjections.of(layer, descriptor)
        kept = most_missed(old.down.weight_OI, moment, int(argument))
        new.copy_channels(old, kept)
        fitted, damping = refit_well(old.down.weight_OI, statistics.channel_halves, kept)
        new.down.write(fitted, old.down.bias_O)
        return f"channel contribution in {ROUNDS} rounds (damping {damping:g})"


VARIANT = IterativeFFN()
