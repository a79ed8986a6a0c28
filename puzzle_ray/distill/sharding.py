"""Models whose weights are sharded over processes (FSDP2): each holds a part of every weight, and gathers one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from puzzle_ray.distill.recomputing import layers_of
from puzzle_ray.models.checkpoint import Checkpoint, check_floats
from puzzle_ray.models.child import model_without_weights
from puzzle_ray.models.describe import describe
from puzzle_ray.models.head import final_states


class Whole(nn.Module):
    """The root of a sharded model. Its forward ends at the final norm, and leaves the root's own weights gathered.

    These are all that are in no layer: embedding, final norm and head. So the head can be used a few tokens at a time afterwards. They
    are sharded again by the backward pass, or by `Shards.release`, which must be called before weights change.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return final_states(self.model, input_ids, position_ids)


class Shards:
    """Shards models over all processes of the default group. `device` is where this process computes.

    With `offload`, shards lie in the host's memory while they are not used.
    """

    def __init__(self, device: torch.device, *, offload: bool = False) -> None:
        self.device, self.offload = device, offload
        self.mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
        self._roots: dict[int, Any] = {}

    @property
    def processes(self) -> int:
        return int(self.mesh.size())

    def load(self, folder: Path, dtype: torch.dtype | None, compute_dtype: torch.dtype | None = None) -> Any:
        """The causal LM of a folder, of which this process reads and holds its shard, in `dtype` or by default in its own.

        With `compute_dtype` its layers compute in it, while weights stay in `dtype` and gradients are summed in float32. Raises
        ParentError as `load_model` does.
        """
        source = Checkpoint(folder)
        model = model_without_weights(folder, dtype)
        check_floats(source, describe(model.config).ignored_weights)
        tied = _tied(model)
        self._shard(model, compute_dtype)
        model.to_empty(device="cpu" if self.offload else self.device)
        for first, *others in tied:  # `to_empty` made a weight of each
            for module, name in others:
                setattr(module, name, getattr(*first))
        self._fill_buffers(model)
        self._fill(model, source)
        return model.eval()

    def _shard(self, model: Any, compute_dtype: torch.dtype | None) -> None:
        how: dict[str, Any] = {"mesh": self.mesh}
        if compute_dtype is not None:
            how["mp_policy"] = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
        if self.offload:
            how["offload_policy"] = CPUOffloadPolicy()
        for layer in layers_of(model):
            if any(True for _ in layer.parameters()):
                fully_shard(layer, **how)
        self._roots[id(model)] = fully_shard(Whole(model), **how)

    def _fill_buffers(self, model: Any) -> None:
        """What no file has, such as rotary frequencies."""
        for parameter in model.parameters():
            parameter._is_hf_initialized = True
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty_like(buffer, device=self.device)
            model._init_weights(module)
        rotary = describe(model.config).rotary
        if rotary:
            where, _, name = rotary.rpartition(".")
            own = type(model.get_submodule(rotary))
            setattr(model.get_submodule(where), name, own(config=model.config).to(self.device))

    @torch.no_grad()
    def _fill(self, model: Any, source: Checkpoint) -> None:
        parameters: dict[str, Any] = dict(model.named_parameters())
        rows = {name: self._own_rows(parameter) for name, parameter in parameters.items()}
        for name, value in source.read((n for n, own in rows.items() if own.start < own.stop), rows):
            parameters[name].to_local().copy_(value)

    def _own_rows(self, parameter: Any) -> slice:
        """Which rows of a weight this process holds: FSDP cuts them as `torch.chunk` does."""
        rows, each = parameter.shape[0], -(-parameter.shape[0] // self.processes)
        start = min(rows, self.mesh.get_local_rank() * each)
        own = slice(start, min(rows, start + each))
        assert parameter.to_local().shape[0] == own.stop - own.start, "a shard is not where it was expected"
        return own

    def states(self, model: Any, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """The output of a model's final norm, as of `final_states`. The weights of its head are gathered afterwards."""
        final: Tensor = self._roots[id(model)](input_ids, position_ids)
        return final

    def release(self, model: Any) -> None:
        """Shards what `states` left gathered."""
        root: FSDPModule = self._roots[id(model)]
        root.reshard()

    def whole_tensors(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
        """Every weight as a whole, on the CPU, one after the other. All processes must go through all of them."""
        for name, parameter in parameters.items():
            value: Any = parameter.detach()
            yield name, value.full_tensor().cpu()


def _tied(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Every weight that several modules have, and where."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((module, name))
    return [found for found in places.values() if len(found) > 1]
