"""Takes a microsecond for each parameter of the layers, and two for each in decoding."""

import torch

from puzzle_ray.models.child import new_child
from puzzle_ray.models.describe import describe


class Counting:
    name = "counting"

    def version(self):
        return "counting 1"

    def device_name(self, use_gpu=False):
        return "an abacus"

    def facts(self, use_gpu=False):
        return {}

    def build(self, config, choices, dtype, use_gpu=False, like=None):
        return new_child(config, choices, getattr(torch, dtype))

    def time_once(self, model, scenario):
        layers = model.get_submodule(describe(model.config).layers)
        milliseconds = sum(parameter.numel() for parameter in layers.parameters()) / 1000
        return milliseconds, 2 * milliseconds


ENGINE = Counting()
