"""`bottleneck:R`: two thin matrices in place of the FFN, behind its norm; they start from the singular values of up, then down."""

import torch
from torch import nn

from puzzle_ray.surgery.projections import FFNProjections


class Bottleneck:
    name, kinds, trainable, needs = "bottleneck", ("ffn",), True, ()

    def resolve(self, argument, kind, config, multiple_of):
        return None if int(argument) >= config.hidden_size else str(int(argument))

    def reshape(self, layer, argument, kind, descriptor, config):
        width, rank, weight = config.hidden_size, int(argument), next(layer.parameters())
        like = {"bias": False, "dtype": weight.dtype, "device": weight.device}
        setattr(layer, descriptor.ffn, nn.Sequential(nn.Linear(width, rank, **like), nn.Linear(rank, width, **like)))

    @torch.no_grad()
    def initialise(self, layer, parent, argument, kind, descriptor, statistics):
        old, new, rank = FFNProjections.of(parent, descriptor), layer.get_submodule(descriptor.ffn), int(argument)
        u, s, v = torch.linalg.svd(old.down.weight_OI @ old.up.weight_OI, full_matrices=False)
        new[0].weight.copy_(v[:rank])
        new[1].weight.copy_(u[:, :rank] * s[:rank])
        for name in descriptor.ffn_norms:
            layer.get_submodule(name).load_state_dict(parent.get_submodule(name).state_dict())
        return "singular values"


VARIANT = Bottleneck()
