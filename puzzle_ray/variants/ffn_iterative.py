"""`ffn_iterative:N`: N FFN channels, found in rounds that look again at what each channel is worth once others are gone.

Of the channels left in a round, the down projection is fitted anew by least squares on calibration tokens, W' = W M_:S M_SS^-1,
M the second moment of the channels' activations and S those left. A channel's contribution is the squared error that dropping it
would add if the others were then fitted once more: ||W'_i||^2 / (M_SS^-1)_ii. The channels that contribute least are dropped, an
equal number in each of `ROUNDS` rounds, and the last fit stays. `ffn:N` looks once, at each channel alone, and fits nothing: it
keeps both of two channels that say the same. Time grows as the cube of the parent's width, memory as its square.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from puzzle_ray.artifacts import SubblockKind
from puzzle_ray.calibration import CHANNELS, Statistics, refit, ridge
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.surgery.projections import FFNProjections
from puzzle_ray.variants.ffn import NarrowFFN

ROUNDS = 8


def least_missed(weight_OI: Tensor, moment: Tensor, width: int, rounds: int = ROUNDS) -> Tensor:
    """The `width` inputs of a projection that are missed most, in ascending order."""
    whole = len(moment)
    kept = torch.arange(whole, device=moment.device)
    for number in range(1, rounds + 1):
        target = whole - (whole - width) * number // rounds
        if target == len(kept):
            continue
        inverse = torch.linalg.inv(ridge(moment[kept][:, kept], 1e-4))
        missed = refit(weight_OI, moment, kept).square().sum(dim=0) / inverse.diagonal()
        kept = kept[missed.topk(target).indices.sort().values]
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
        kept = least_missed(old.down.weight_OI, moment, int(argument))
        new.keep(old, kept)
        new.down.write(refit(old.down.weight_OI, moment, kept), old.down.bias_O)
        return f"channel contribution in {ROUNDS} rounds"


VARIANT = IterativeFFN()
